"""Names of files and classes: as text, which of them are images, junk or ImageNet's wnids, and the order of classes.

While images are looked for, a name is its bytes on disk, decoded as UTF-8 with surrogates for bytes that are not UTF-8, in
any locale. Everybody else sees `text_of` it, which can always be printed and stored, and from which `name_of` gets the
bytes back.
"""

import re

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
MADE_BY_SYSTEMS = {"@eaDir", "#recycle", "__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "lost+found"}
WNID = re.compile(r"n\d{8}")


def text_of(name):
    """Return a name or path that can be printed and stored as UTF-8 anywhere; itself unless bytes of it are not UTF-8.

    Those become `\\xe9`. So that name_of can go back, a name that looks so by itself has its backslashes written as `\\x5c`.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        pass
    else:
        if not re.search(r"\\x[0-9a-f]{2}", name):
            return name
    if "/" in name:  # each name for itself: a path's text is its names' texts
        return "/".join(map(text_of, name.split("/")))
    return name.replace("\\", "\\x5c").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def name_of(text):
    """Return the name that text_of made the text of."""
    content = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), text.encode())
    return content.decode("utf-8", "surrogateescape")


def path_bytes(name):
    """Return the bytes that a name or path is on disk."""
    return name.encode("utf-8", "surrogateescape")


def is_image_name(name):
    """Return whether torchvision's ImageFolder would take a file of this name as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_junk(name):
    """Return whether a file or folder is hidden, or one of those that systems leave everywhere."""
    return name.startswith(".") or name in MADE_BY_SYSTEMS


def are_numbers(names):
    """Return whether there are names and all of them are numbers."""
    return bool(names) and all(name.isascii() and name.isdigit() for name in names)


def class_order(names):
    """Return class names in the order of their labels: as numbers where all are numbers (0, 1, 2, ... 10), else as text."""
    return sorted(names, key=_numeric if are_numbers(names) else None)


def _numeric(name):
    digits = name.lstrip("0")
    return len(digits), digits, name  # as int(name), which has a limit on digits


def some(names, most=5):
    """Return the first names as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
