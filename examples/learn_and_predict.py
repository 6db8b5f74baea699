"""Learn two domains from folders CLASS/*.jpg and ask what is on a picture, given in five ways."""

from pathlib import Path

import numpy as np
from PIL import Image

from edgeear import Ear, Learned

ear = Ear()  # the default encoder; it is made once, which takes up to half a minute
for folder in ("photos/day", "photos/night"):
    outcome = ear.learn(folder)
    print(outcome)
    if not isinstance(outcome, Learned):  # a Rejected says why; nothing was changed
        raise SystemExit(1)

path = Path("photo.jpg")
with path.open("rb") as file:
    for picture in (path, path.read_bytes(), file, Image.open(path), np.asarray(Image.open(path))):
        print(ear.predict(picture))

answer = ear.predict("photo.jpg")
print(answer.label, answer.route, answer.ood, answer.novelty)
for label, probability in answer.probabilities.items():
    print(f"  {label}: {probability:.1%}")

for answer in ear.predict(sorted(Path("photos/night/cat").glob("*.jpg"))):  # a list gives a list
    print(answer)
