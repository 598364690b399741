"""What each command takes and does: one module a feature, which `rlpretrain.cli` registers."""
