"""Draw a grid of digits, one class per column: python examples/sample.py [MODEL_FOLDER]"""

import sys
from pathlib import Path

import marval
from marval.images import image_grid, save_png

model = marval.load(sys.argv[1] if len(sys.argv) > 1 else "digits/student")
images = model.sample(range(len(model.class_names)), num_images=4 * len(model.class_names), seed=0)
save_png(Path("grid.png"), image_grid(images, columns=len(model.class_names), scale=8))
