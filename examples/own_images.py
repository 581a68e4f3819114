"""Teacher and one-step student of your images: python examples/own_images.py FOLDER OUT [UPDATES]

FOLDER has one sub-folder of images per class.
"""

import sys
from dataclasses import replace
from pathlib import Path

from marval.distill import distill
from marval.recipes import digits_student, digits_teacher
from marval.train import train

if len(sys.argv) < 3:
    sys.exit(__doc__)
folder, out = sys.argv[1], Path(sys.argv[2])
updates = int(sys.argv[3]) if len(sys.argv) > 3 else 3000
sizes = {"data": folder, "image_size": 32, "steps": updates}
train(replace(digits_teacher(), patch_size=4, **sizes), out / "teacher")
student = distill(replace(digits_student(), **sizes), out / "teacher", out / "student")
print(student.sample(0, num_images=4).shape, "uint8 NHWC")
