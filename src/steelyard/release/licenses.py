"""The licence of a release: stated by its maker or by the base model's, never guessed.

    parse_license("apache-2.0")
    parse_license("other", name="acme-research", link="LICENSE")

Identifiers are those of the Hugging Face Hub (huggingface.co/docs/hub/repositories-licenses), each with its SPDX
identifier (spdx.org/licenses) where SPDX lists that licence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from steelyard.base.errors import UsageError
from steelyard.base.yamlfile import nearest

# Hub identifier -> SPDX identifier; None where SPDX has none, or where the identifier names a whole family.
HUB_LICENSES: dict[str, str | None] = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "openrail": None,
    "bigscience-openrail-m": None,
    "creativeml-openrail-m": None,
    "bigscience-bloom-rail-1.0": None,
    "bigcode-openrail-m": None,
    "afl-3.0": "AFL-3.0",
    "artistic-2.0": "Artistic-2.0",
    "bsl-1.0": "BSL-1.0",
    "bsd": None,
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-3-clause-clear": "BSD-3-Clause-Clear",
    "c-uda": "C-UDA-1.0",
    "cc": None,
    "cc0-1.0": "CC0-1.0",
    "cc-by-2.0": "CC-BY-2.0",
    "cc-by-2.5": "CC-BY-2.5",
    "cc-by-3.0": "CC-BY-3.0",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-3.0": "CC-BY-SA-3.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-2.0": "CC-BY-NC-2.0",
    "cc-by-nc-3.0": "CC-BY-NC-3.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nd-4.0": "CC-BY-ND-4.0",
    "cc-by-nc-nd-3.0": "CC-BY-NC-ND-3.0",
    "cc-by-nc-nd-4.0": "CC-BY-NC-ND-4.0",
    "cc-by-nc-sa-2.0": "CC-BY-NC-SA-2.0",
    "cc-by-nc-sa-3.0": "CC-BY-NC-SA-3.0",
    "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "cdla-sharing-1.0": "CDLA-Sharing-1.0",
    "cdla-permissive-1.0": "CDLA-Permissive-1.0",
    "cdla-permissive-2.0": "CDLA-Permissive-2.0",
    "wtfpl": "WTFPL",
    "ecl-2.0": "ECL-2.0",
    "epl-1.0": "EPL-1.0",
    "epl-2.0": "EPL-2.0",
    "etalab-2.0": "etalab-2.0",
    "eupl-1.1": "EUPL-1.1",
    "eupl-1.2": "EUPL-1.2",
    "agpl-3.0": "AGPL-3.0-only",
    "gfdl": None,
    "gpl": None,
    "gpl-2.0": "GPL-2.0-only",
    "gpl-3.0": "GPL-3.0-only",
    "lgpl": None,
    "lgpl-2.1": "LGPL-2.1-only",
    "lgpl-3.0": "LGPL-3.0-only",
    "isc": "ISC",
    "lppl-1.3c": "LPPL-1.3c",
    "ms-pl": "MS-PL",
    "mpl-2.0": "MPL-2.0",
    "odc-by": "ODC-By-1.0",
    "odbl": "ODbL-1.0",
    "openrail++": None,
    "osl-3.0": "OSL-3.0",
    "postgresql": "PostgreSQL",
    "ofl-1.1": "OFL-1.1",
    "ncsa": "NCSA",
    "unlicense": "Unlicense",
    "zlib": "Zlib",
    "pddl": "PDDL-1.0",
    "lgpl-lr": "LGPLLR",
    "deepfloyd-if-license": None,
    "fair-noncommercial-research-license": None,
    "llama2": None,
    "llama3": None,
    "llama3.1": None,
    "llama3.2": None,
    "llama3.3": None,
    "llama4": None,
    "gemma": None,
    "apple-amlr": None,
    "apple-ascl": None,
    "intel-research": None,
    "h-research": None,
}
OTHER = "other"
LICENSE_FILES = ("LICENSE", "LICENSE.txt")  # that a model folder may hold
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")
_LINK = re.compile(r"https://[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/+%=&?#@:-]*)?")


@dataclass(frozen=True)
class License:
    """`id` as the Hub spells it; `other` has a name and a link (https://, or a file of the model folder)."""

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def spdx(self) -> str | None:
        """The SPDX identifier, where there is one."""
        return HUB_LICENSES.get(self.id)

    @property
    def title(self) -> str:
        """What people call it."""
        return self.spdx or self.name or self.id


def parse_license(identifier: str, name: str | None = None, link: str | None = None) -> License:
    """The licence of that identifier, in the Hub's or in SPDX's spelling. Raises UsageError for an unknown one.

    `other` needs a name and a link: an https:// address, or LICENSE or LICENSE.txt beside the weights. `name` and
    `link` may be given with any other identifier too.
    """
    by_spdx = {spdx.lower(): hub for hub, spdx in HUB_LICENSES.items() if spdx is not None}
    key = identifier.strip().lower()
    key = key if key in HUB_LICENSES or key == OTHER else by_spdx.get(key, key)
    if key not in HUB_LICENSES and key != OTHER:
        text = f"license: {identifier[:60]!r} is none that the Hub lists{nearest(key, HUB_LICENSES)}"
        raise UsageError(f"{text}: give one of its identifiers, or `other` with a name and a link")
    if key == OTHER and not (name and link):
        raise UsageError("license: other needs a license_name, and a license_link (https://..., or the file LICENSE)")
    if name is not None and not _NAME.fullmatch(name):
        raise UsageError(f"license_name: {name[:60]!r}: letters, digits, spaces and . _ + - only, at most 100")
    if link is not None and link not in LICENSE_FILES and not (len(link) <= 500 and _LINK.fullmatch(link)):
        raise UsageError(f"license_link: {link[:80]!r}: give an https:// address, or {' or '.join(LICENSE_FILES)}")
    return License(key, name, link)
