"""From text to positions: rows, token ids, documents with an exact cursor, and where to think in them."""
