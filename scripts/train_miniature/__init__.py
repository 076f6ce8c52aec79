"""Training of the miniature: every network of Kandinsky 2.2, small, on pictures that `scripts.miniature` draws.

`configs` says how small, `batches` makes pictures and captions into tensors, a task (`autoencoder`, `clip`, `prior`,
`decoder`) says what is minimised, `loop` minimises it, and `checkpoints` writes what diffusers and kandrt read.
"""
