"""Report: one self-contained HTML page from runs, packages and folders of vectors."""
