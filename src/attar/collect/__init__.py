"""See docs/design.md, section 4."""
