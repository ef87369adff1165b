"""What each command does: a function that takes its parsed arguments and returns the exit status.

These files import nothing but argparse and its kin. Whatever a command needs it imports itself, so that help,
completion and wrong commands are answered at once.
"""
