"""What does a service of the mesh look like? As it did before: `meshlib serve orders:app`."""

from fastapi import FastAPI

import meshlib

app = FastAPI()


@app.get("/items/{item}")
def show(item: int) -> dict[str, object]:
    caller = meshlib.peer()  # who called, as proved by the connection
    return {"item": item, "price": 5 + item, "for": caller and caller.service}
