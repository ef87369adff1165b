"""The arithmetic of keys and values: the published byte tables, both readings of the formula, chips and rooflines.

kvlab reproduce kv_arithmetic
"""

import sys
from pathlib import Path

import pandas as pd

from kvlab.capacity.presets import Preset
from kvlab.capacity.roofline import intensity
from kvlab.compose import compose_capacity
from kvlab.hardware import CHIPS
from kvlab.lab.axes import byte_axis
from kvlab.lab.claims import Claim, verdict
from kvlab.lab.plots import beside_legend, save, sheet
from kvlab.lab.styles import GREY, INK, PALETTE, colour

HERE = Path(__file__).resolve().parent
LONG = 131_072
PER_TOKEN = {
    ("llama3-70b", "published"): 327_680,
    ("llama3-70b", "mha"): 2_621_440,
    ("llama3-70b", "mqa"): 40_960,
    ("llama3-8b", "published"): 131_072,
    ("llama31-405b", "published"): 516_096,
    ("deepseek-v3", "published"): 70_272,
    ("deepseek-v2", "published"): 69_120,
    ("opt-13b", "published"): 819_200,
    ("opt-66b", "published"): 2_359_296,
    ("opt-175b", "published"): 4_718_592,
}
AT_LENGTH = {  # model, variant, tokens: GiB, tolerance of the printed digits
    ("llama3-70b", "published", LONG): (40, 0),
    ("llama3-70b", "mha", LONG): (320, 0),
    ("llama3-70b", "mqa", LONG): (5, 0),
    ("llama3-8b", "published", LONG): (16, 0),
    ("llama31-405b", "published", LONG): (63, 0),
    ("deepseek-v3", "published", LONG): (8.58, 0.005),
    ("deepseek-v2", "published", LONG): (8.44, 0.005),
    ("gpt-oss-120b", "published", LONG): (4.504, 0.0005),
    ("gpt-oss-120b", "gqa", LONG): (9.0, 0),
    ("gemma3-27b", "published", LONG): (10.41, 0.005),
    ("jamba", "published", 262_144): (4.0, 0.01),
    ("mixtral-8x7b", "published", 262_144): (32, 0),
    ("llama2-7b", "published", 262_144): (128, 0),
}
PER_SEQUENCE = {"mamba2-2.7b": 86_638_592, "mamba2-1.3b": 52_002_816, "mamba-2.8b": 13_107_200}
JAMBA_STATES = 9_175_040
DATASHEETS = {
    "a100": (80, 2_039, 312),
    "h100": (80, 3_350, 989),
    "h200": (141, 4_800, 989),
    "b200": (180, 8_000, 2_250),
    "mi300x": (192, 5_300, 1_307),
    "v5e": (16, 819, 197),
    "v5p": (95, 2_765, 459),
    "v6e": (32, 1_638, 918),
    "tpu7x": (192, 7_380, 2_307),
}
"""Memory in GB, GB/s, dense bf16 TFLOP/s."""


def preset(name: str, variant: str = "published") -> Preset:
    """A model of `configs/capacity/model`."""
    return compose_capacity([f"model={name}", f"model.variant={variant}"]).model


def per_token(model: Preset) -> int:
    """Bytes of one token's state over all layers."""
    return sum(count * spec.unit_bytes for spec, count in model.specs("bfloat16").items() if spec.per_token)


def claims() -> list[Claim]:
    """Every figure, from the specs that the ledger allocates by."""
    rows = [
        Claim.exact(f"{name}, {variant}: bytes a token", expected, per_token(preset(name, variant)))
        for (name, variant), expected in PER_TOKEN.items()
    ]
    for (name, variant, length), (expected, tolerance) in AT_LENGTH.items():
        found = _published_bytes(preset(name, variant), length) / 2**30
        rows.append(Claim.near(f"{name}, {variant}: {length:,} tokens", expected, found, tolerance + 1e-9, " GiB"))
    for name, expected in PER_SEQUENCE.items():
        found = [preset(name).logical_bytes(length, "bfloat16") for length in (1, LONG)]
        rows.append(Claim.exact(f"{name}: bytes a sequence, any length", expected, found[0]))
        rows.append(Claim.exact(f"{name}: the same at {LONG:,} tokens", found[0], found[1]))
    states = sum(n * spec.unit_bytes for spec, n in preset("jamba").specs("bfloat16").items() if not spec.per_token)
    rows.append(Claim.exact("jamba: bytes of Mamba states a sequence", JAMBA_STATES, states))
    llama = preset("llama3-70b")
    (group,) = llama.groups()
    with_query_heads = 2 * group.count * group.num_heads * group.head_dim * 2
    rows.append(Claim.exact("2*L*S*H*d with query heads is 8 times too large", 8 * per_token(llama), with_query_heads))
    rows.append(Claim.near("llama3-70b: weights", 140, llama.weight_bytes / 1e9, 2, " GB"))
    for name, variant, expected in (
        ("llama3-70b", "mha", 1),
        ("llama3-70b", "gqa", 8),
        ("llama3-70b", "mqa", 64),
        ("deepseek-v3", "published", 242),
    ):
        rows.append(
            Claim.near(f"{name}, {variant}: FLOP a byte", expected, intensity(preset(name, variant), LONG), 0.5)
        )
    for name, (memory, bandwidth, peak) in DATASHEETS.items():
        chip = CHIPS[name]
        same = (chip.memory_gb, chip.bandwidth_gb_s, chip.bf16_tflops) == (memory, bandwidth, peak)
        rows.append(
            Claim(
                f"{name}: GB, GB/s, dense TFLOP/s",
                f"{memory}, {bandwidth:,}, {peak:,}",
                "the same" if same else str(chip),
                same,
            )
        )
    mla = intensity(preset("deepseek-v3"), LONG)
    beyond = sorted(name for name, chip in CHIPS.items() if mla > chip.ridge)
    rows.append(
        Claim(
            "chips on which MLA's decode is bound by compute",
            "a100, h200, v5e, v5p",
            ", ".join(beyond),
            beyond == ["a100", "h200", "v5e", "v5p"],
        )
    )
    return rows


def _published_bytes(model: Preset, length: int) -> int:
    """As printed: a window's tokens counted with the current one, which `live(n)` leaves out; states once."""
    total = 0
    for spec, count in model.specs("bfloat16").items():
        held = 1 if not spec.per_token else length if spec.span is None else min(length, spec.span + 1)
        total += count * spec.unit_bytes * held
    return total


def redraw(output: Path = HERE) -> None:
    """arithmetic.png, of the table beside this file."""
    draw(list(pd.read_csv(HERE / "bytes.csv").model), output / "arithmetic.png")


def main(output: Path = HERE, results: Path | None = None) -> int:
    """Writes bytes.csv and arithmetic.png; returns 1 if a claim fails."""
    names = sorted({name for name, _ in PER_TOKEN} | {name for name, *_ in AT_LENGTH} | set(PER_SEQUENCE))
    rows = []
    for name in names:
        model = preset(name)
        sizes = {f"bytes_at_{n}": model.logical_bytes(n, "bfloat16") for n in (1024, 32_768, LONG)}
        rows.append(
            {
                "model": name,
                "weight_bytes": model.weight_bytes,
                "bytes_per_token": per_token(model),
                **sizes,
                "flop_per_byte": intensity(model, LONG),
                "source": model.source.strip(),
            }
        )
    pd.DataFrame(rows).to_csv(output / "bytes.csv", index=False, float_format="%.4g")
    draw(names, output / "arithmetic.png")
    return verdict(claims(), "Bytes, chips and rooflines")


def draw(names: list[str], path: Path) -> None:
    """State against context for every model, the largest at the end first in the legend; decode intensity against the
    chips' ridges."""
    figure, (growth, ridge) = sheet(1, 2, size=(15, 5.6))
    lengths = [2**power for power in range(8, 21)]
    models = {name: preset(name) for name in names}
    grown = {name: [model.logical_bytes(n, "bfloat16") for n in lengths] for name, model in models.items()}
    for place, name in enumerate(sorted(names, key=lambda name: -grown[name][-1])):
        dash = ("-", "--", ":")[place // len(PALETTE)]
        growth.loglog(lengths, grown[name], ls=dash, lw=1.8, color=PALETTE[place % len(PALETTE)], label=name)
    byte_axis(growth, "y")
    growth.set_xticks([2**power for power in range(8, 21, 4)], ["256", "4 Ki", "64 Ki", "1 Mi"])
    growth.minorticks_off()
    growth.set(xlabel="context, tokens", ylabel="one sequence, bf16", title="What a sequence holds")
    beside_legend(growth)
    ends = {
        "MHA": ("llama3-70b", "mha"),
        "GQA-8": ("llama3-70b", "gqa"),
        "MQA": ("llama3-70b", "mqa"),
        "MLA": ("deepseek-v3", "published"),
    }
    for place, (name, pair) in enumerate(ends.items()):
        value = intensity(preset(*pair), LONG)
        ridge.plot(value, place, "o", ms=10, color=colour(name.partition("-")[0].lower()))
        style = {"textcoords": "offset points", "va": "center", "ha": "right"}
        ridge.annotate(f"{value:.3g}", (value, place), (-10, 0), **style)
    ridge.set_yticks(range(len(ends)), list(ends))
    for place, (name, chip) in enumerate(sorted(CHIPS.items(), key=lambda item: item[1].ridge)):
        ridge.axvline(chip.ridge, color=GREY, lw=1, ls=":")
        style = {"fontsize": 8, "color": INK, "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
        ridge.text(chip.ridge * 1.02, -0.45 + 0.3 * place, name, **style)
    ridge.set(xscale="log", xlim=(0.5, 1200), ylim=(-0.7, len(ends) - 0.4), title="What bounds decode")
    ridge.set_xticks((1, 10, 100, 1000), ("1", "10", "100", "1,000"))
    ridge.set_xlabel("FLOP a byte of state read at decode (dotted: chips' ridges, bf16)")
    for axes in (growth, ridge):
        axes.grid(alpha=0.25)
    save(figure, [path])


if __name__ == "__main__":
    sys.exit(main())
