"""Measure on pictures that were not learned, add what is missing, forget what is not wanted."""

from pathlib import Path

from edgeear import Ear, KnownDomain

ear = Ear()
print(ear.learn("photos/day"))
print(ear.learn("photos/night"))

print(ear.evaluate("held_out"))  # CLASS/* or DOMAIN/CLASS/*
print(ear.evaluate("held_out/day").accuracy)

try:
    ear.learn("photos/day")
except KnownDomain as error:  # nothing known is replaced in silence
    print(error)

birds = sorted(Path("more/day/bird").glob("*.jpg"))
print(ear.update("day", birds, ["bird"] * len(birds)))  # more pictures of a domain, here of a new class
print(ear.classes)

print(ear.forget("day", "bird", birds))  # exactly, with all pictures learned of the class
print(ear.forget("night"))
print(ear)
