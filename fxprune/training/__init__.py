"""What the reference trainer (`fxprune.fit`) is made of.

| file | what it holds |
|---|---|
| `recipe.py` | how to train, in numbers |
| `batches.py` | what a batch must be, and what is said of one that is not |
| `randomness.py` | every random state that training draws from, taken and put back |
| `state.py` | the checkpoint: where training stands, in a file that a crash cannot tear |
| `meter.py` | how far it is, for a person |
"""
