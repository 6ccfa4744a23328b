"""`vivace report`: runs of `vivace bench` as one page that people look at, figures as files, tables as markdown.

No plotting library: figures.py chooses what a set of rows shows and svg.py draws it, so that a figure follows the
reader's light or dark mode, is sharp on every screen and takes a kilobyte or two. No torch.
"""
