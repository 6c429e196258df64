"""What people call a class: its description, where the data set has one, or else the name of its folder."""


def class_in_words(name, class_names):
    """Return a class's description, or its name as it is, in one line.

    Args:
        class_names: {class: description}, as far as known; ImageNet's are synonyms with commas between them.
    """
    return " ".join(class_names.get(name, name).splitlines())


def class_in_short(name, class_names):
    """Return the first synonym of a class's description, or its name, of which a comma is a part; in one line."""
    words = class_in_words(name, class_names)
    return words.split(",")[0] if class_names.get(name, name) != name else words
