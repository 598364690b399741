"""`python -m rlpretrain`, as `rlpretrain`."""

from rlpretrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
