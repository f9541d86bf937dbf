"""The bundled sample: one document per operation of the API reference inside the installed `botocore` wheel."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from evals.collections import EvalSetError
from evals.sample.reference import Tier, services
from rag_assets.hypertext import read_page
from rag_assets.sources.items import DOCUMENT, Item
from rag_serving.errors import SourceError

_CASE_CHANGE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass(frozen=True, slots=True)
class SampleSource:
    """3,267 documents of 44 services, or 1,294 of ec2, iam, rds and s3 in the small tier, at the pinned botocore.

    `doc_id` is "service.Operation". The text is the operation's documentation; the worked examples, from which the eval set is made, are no
    part of it.
    """

    uri: str
    tier: Tier

    def items(self) -> Iterator[Item]:
        try:
            for service in services(self.tier):
                about = service.model["metadata"]
                for operation, page in service.operations.items():
                    row = {
                        "doc_id": f"{service.name}.{operation}",
                        "uri": f"https://docs.aws.amazon.com/goto/WebAPI/{about['uid']}/{operation}",
                        "title": f"{about['serviceFullName']}: {_CASE_CHANGE.sub(' ', operation)}",
                        "text": page,
                        "metadata": {"service": service.name, "operation": operation},
                    }
                    content = json.dumps(row).encode()
                    version = hashlib.sha256(content).hexdigest()
                    yield Item(f"{service.name}.{operation}", version, DOCUMENT, len(content), partial(_document, row))
        except EvalSetError as error:
            raise SourceError(error.what, fix=error.fix) from None


def _document(row: Mapping[str, object]) -> bytes:
    return json.dumps({**row, "text": read_page(str(row["text"]), marked=False).text}).encode()
