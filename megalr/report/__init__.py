"""Reports on runs: one page with interactive plots, figures as PNG and SVG.

In: folders of runs. Out: files that need nothing else to be looked at. Must not know: models,
engines, the training loop; it reads what runs have recorded.
"""
