"""How results look: tables, and the demo."""
