"""What has grown beside the three modules of the service, one noun a module."""

import sys
import typing
import warnings

# requests would guess by it in what encoding an answer is, which nobody asks for: 3 MB less
warnings.filterwarnings("ignore", "Unable to find acceptable character detection")
modules: dict[str, typing.Any] = sys.modules
modules.setdefault("charset_normalizer", None)
