"""Keep what was learned on disk and go on another day; take the last change back while it is not saved."""

from edgeear import Ear

ear = Ear()
print(ear.learn("photos/day"))
print("saved as generation", ear.save("kept"))

ear = Ear.load("kept")  # in another process, on another day
print(ear)
print(ear.learn("photos/night"))
print("undone:", ear.undo(), ear.domains)

print(ear.learn("photos/night", name="evening"))
print("saved as generation", ear.save("kept"))
print(Ear.load("kept").domains)
