"""A narrow ResNet-18 in place of the whole one: a quarter of the channels behind the stem, a sixteenth of the weights.

Runs, saves and resumptions are the same code with it, and take a quarter of the time. `python tests/narrow.py PROGRAM ...` runs
one of the programs with it; the other architectures are as they are.
"""

import os
import runpy
import sys
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parent.parent
WHOLE = "TESTS_WITH_WHOLE_NETWORK"  # in the environment: nothing is narrow


def narrow_build_model():
    """Return a build_model for the programs, whose resnet18 is narrow."""
    import torch

    import model

    whole = model.build_model

    class NarrowResNet(model.ResNet):
        def __init__(self, block, layers, num_classes, **options):
            super().__init__(block, layers, num_classes=num_classes, **options)
            self.fc = torch.nn.Linear(self.fc.in_features // 4, num_classes)

        def _make_layer(self, block, planes, *arguments, **options):
            return super()._make_layer(block, planes // 4, *arguments, **options)

    def build_model(config, *others):
        if config["architecture"] != "resnet18" or os.environ.get(WHOLE):
            return whole(config, *others)
        with mock.patch.object(model, "ResNet", NarrowResNet):
            return whole(config, *others)

    return build_model


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[:1] = [str(Path(sys.argv[0]).resolve().parent), str(REPOSITORY)]
    if not {"-h", "--help"} & set(sys.argv):
        import model

        model.build_model = narrow_build_model()
    runpy.run_path(sys.argv[0], run_name="__main__")
