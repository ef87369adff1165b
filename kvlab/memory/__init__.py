"""The memory on the device: how states are laid out (`layout`), and their arrays (`pools`)."""
