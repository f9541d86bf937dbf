"""The bundled sample: one document per operation of the API reference inside the installed `botocore` wheel."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from evals.collections import EvalSetError
from evals.sample.reference import Service, Tier, data_folder, services
from rag_assets.sources import Document, SourceFile, hash_file, html_text
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

    def _services(self) -> Iterator[Service]:
        try:
            yield from services(self.tier)
        except EvalSetError as error:
            raise SourceError(error.what, fix=error.fix) from None

    def files(self) -> Iterator[SourceFile]:
        for service in self._services():
            yield hash_file(service.model_file, f"botocore/data/{service.model_file.relative_to(data_folder()).as_posix()}")

    def documents(self) -> Iterator[Document]:
        for service in self._services():
            about = service.model["metadata"]
            for operation, page in service.operations.items():
                yield Document(
                    doc_id=f"{service.name}.{operation}",
                    uri=f"https://docs.aws.amazon.com/goto/WebAPI/{about['uid']}/{operation}",
                    title=f"{about['serviceFullName']}: {_CASE_CHANGE.sub(' ', operation)}",
                    text=html_text(page)[1],
                    metadata={"service": service.name, "operation": operation},
                )
