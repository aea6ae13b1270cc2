"""The identity of an archive's traffic, computed from the content of the archive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from early_exit.handler.archive_contents import ArchiveContents
from early_exit.handler.archive_layout import ArchiveLayout, read_manifest
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.handler.user_handler.traffic import traffic_identity
from early_exit.training.data.preprocessing import archived_config
from early_exit.training.text_files import parse_yaml

OTHER_TRAFFIC = ("the plan is certified for other traffic than this version gets, so it answers every request in full "
                 "until it has a plan from records of its own")


def is_of_other_traffic(contents: ArchiveContents) -> bool:
    """Tell whether the certificate of an archive's plan is about other traffic, so that it promises nothing here.

    Raises:
        ConfigError: the archive's configuration cannot be read.
    """
    plan = contents.plan
    return plan is not None and plan.certificate is not None and not plan.is_certified_for(traffic_of(contents))


def traffic_of(contents: ArchiveContents) -> str:
    """Return the identity of the traffic of an archive; empty if an earlier version made the archive and wrote none.

    Raises:
        ConfigError: the archive's configuration cannot be read.
    """
    config = parse_yaml(contents.configuration, "the configuration of the archive")
    return _identity(contents.description, contents.original_manifest, contents.handler, config)


def traffic_in(layout: ArchiveLayout, backbone: BackboneDescription) -> str:
    """Return the identity of the traffic of an extracted archive; also empty if the archive has no handler.

    Raises:
        ArchiveError: the archive's manifest or the description of its handler cannot be read.
        FormatError: this version does not read the format of that description.
        ConfigError: the archive's configuration cannot be read.
    """
    if not layout.original_manifest.exists():  # the archive has no handler
        return ""
    description = HandlerDescription.load(layout.handler_description)
    return _identity(backbone, read_manifest(layout.original_manifest), description, archived_config(layout))


def _identity(backbone: BackboneDescription, original_manifest: Mapping[str, Any], handler: HandlerDescription,
              config: object) -> str:
    return traffic_identity(backbone.sha256, original_manifest, handler, handler.files or {},
                            config if isinstance(config, dict) else {})
