"""`python -m rlpretrain`, as `rlpretrain`."""

from rlpretrain.cli import main

raise SystemExit(main())
