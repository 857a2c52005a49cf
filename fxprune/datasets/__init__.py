"""What the data sets (`fxprune.data`) are made of.

| file | what it holds |
|---|---|
| `formats.py` | readers of CIFAR's and idx files |
| `downloads.py` | fetching, checking and unpacking archives |
| `folders.py` | folders of images |
| `augment.py` | crops, flips and normalisation of whole batches |
| `loaders.py` | the loaders themselves, in an order that a training can store and restore |
"""
