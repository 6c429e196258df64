"""How the images are shown to a network that is scored: as its own run did, unless the command line names another view."""

from typing import NamedTuple

from engine.system.errors import UserError


class View(NamedTuple):
    """How the images are shown to a network that is scored."""

    resolutions: tuple  # px
    crop_ratio: float
    flip: bool

    def __str__(self):
        sizes = " and ".join(f"{resolution} px" for resolution in self.resolutions)
        return f"{sizes}, crop ratio {self.crop_ratio:.4g}" + (", also mirrored" if self.flip else "")


def view_of(network, resolutions=None, scores=True):
    """Return the View of a network.

    Args:
        resolutions: px, in place of the run's.
        scores: whether the network is to be scored; otherwise there are no mirror images.
    """
    config = network.config
    return View(tuple(resolutions or [config["val_resolution"]]), config["val_crop_ratio"], scores and config["val_flip"])


def differing_views(networks, resolutions=None, scores=True):
    """Return how the networks differ in their View, in words; an empty text if they agree."""
    views = {network.path: view_of(network, resolutions, scores) for network in networks}
    if len(set(views.values())) == 1:
        return ""
    theirs = "; ".join(f"{path}: {view}" for path, view in views.items())
    return f"each was validated in its own way ({theirs}); --resolution, --crop-ratio and --flip name one for all"


def require_one_view(flag, networks, resolutions, scores):
    """Raise UserError if the networks, which a flag wants to use as one, differ in their View."""
    if differing := differing_views(networks, resolutions, scores):
        raise UserError(f"{flag}: {differing}")
