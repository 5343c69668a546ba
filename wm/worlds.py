"""Take-cover in other worlds: the same game with other textures, or of another skill.

The scenario is a WAD: a header, lumps of bytes, and a directory of their places and names. Its lump
TEXTMAP is a text that names the texture of every wall, floor and ceiling.
"""

import difflib
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from wm.config import ConfigError, bounded

HEADER, ENTRY = struct.Struct("<4sii"), struct.Struct("<ii8s")
SURFACES = {"wall": "texturemiddle", "floor": "texturefloor", "ceiling": "textureceiling"}


@dataclass(frozen=True)
class World:
    """What may be different in take-cover; the defaults are the scenario's own."""

    skill: int = bounded(4, 1, 5)  # 2 to 4 are the same game: they place things that are not here
    wall: str = "BRICK12"  # textures of freedoom2.wad, which comes with ViZDoom
    floor: str = "CRATOP1"
    ceiling: str = "CRATOP1"

    def __str__(self) -> str:
        """What is different."""
        mine = vars(self).items()
        return ", ".join(f"{name} {value}" for name, value in mine if value != vars(ORDINARY)[name])


ORDINARY = World()  # that of training


def require_world(game: str, world: World) -> None:
    """That there is such a world of a game.

    Raises:
        ConfigError: if there is none, naming the nearest texture.
    """
    if world == ORDINARY:
        return
    if game != "takecover":
        raise ConfigError(f"evaluate.world is for env=takecover; {game} has only one")
    known = textures()
    for surface in SURFACES:
        name = getattr(world, surface)
        if name not in known:
            nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"evaluate.world.{surface}={name} is no texture of freedoom2.wad; "
                f"did you mean {nearest}?"
            )


def textures() -> list[str]:
    """The names of what the engine can draw on a surface."""
    import vizdoom  # slow to load

    lumps = read_lumps(Path(vizdoom.__file__).with_name("freedoom2.wad"))
    names = [name for name, _ in lumps]
    flats = names[names.index("F_START") : names.index("F_END")]
    flats = [name for name in flats if not name.endswith(("_START", "_END"))]
    table = dict(lumps)["TEXTURE1"]  # a count, as many places in the table, and there the names
    (count,) = struct.unpack_from("<i", table)
    places = struct.unpack_from(f"<{count}i", table, 4)
    return flats + [_text(table[place : place + 8]) for place in places]


def write_scenario(world: World, original: Path, path: Path) -> None:
    """A copy of take-cover's scenario with a world's textures."""
    lumps = read_lumps(original)
    map_text = dict(lumps)["TEXTMAP"].decode()
    for surface, key in SURFACES.items():
        texture = f'{key} = "{getattr(world, surface)}"'
        map_text, count = re.subn(rf'\b{key} = "\w+"', lambda _, new=texture: new, map_text)
        assert count, f"{original} has no {key}"
    write_lumps([(n, map_text.encode() if n == "TEXTMAP" else part) for n, part in lumps], path)


def read_lumps(path: Path) -> list[tuple[str, bytes]]:
    """The lumps of a WAD in order, with their names, of which some may be equal."""
    data = path.read_bytes()
    _, count, directory = HEADER.unpack_from(data)
    entries = ENTRY.iter_unpack(data[directory : directory + count * ENTRY.size])
    return [(_text(name), data[place : place + size]) for place, size, name in entries]


def write_lumps(lumps: list[tuple[str, bytes]], path: Path) -> None:
    """A WAD that adds to the game's own."""
    body, directory = b"", b""
    for name, part in lumps:
        directory += ENTRY.pack(HEADER.size + len(body), len(part), name.encode())
        body += part
    path.write_bytes(HEADER.pack(b"PWAD", len(lumps), HEADER.size + len(body)) + body + directory)


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("ascii")
