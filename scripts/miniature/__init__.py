"""The miniature: a small world of coloured shapes that a small Kandinsky learns to draw, and the judge of its pictures.

`world` says what a scene is and invents them, `drawing` draws them with their depth hints and masks, `captions` puts
them into words and reads the words back, `seeing` finds out what a picture shows and `judge` compares that with what
a prompt asked for. Everything is NumPy and Pillow: no network judges a network.
"""
