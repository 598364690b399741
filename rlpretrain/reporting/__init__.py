"""Reports: a run as one HTML file."""
