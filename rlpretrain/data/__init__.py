"""Text becomes documents, and documents become places to think: rows, token ids, an exact cursor,
positions.
"""
