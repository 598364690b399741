"""Tools beside a run: the check of an installation, the dry run, the server."""
