"""How reports, analyses and scans look: in a terminal, and as pages. Names from users are escaped.

| file | what it makes |
|---|---|
| `words.py` | numbers and names as words |
| `tables.py` | tables of text |
| `plots.py` | drawings |
| `page.py`, `*.html` | self-contained pages |
"""
