"""The OpenAPI document and the gateway agree: whatever is sent, each answer is one that the document knows."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance

from render_platform.clock import SystemClock, iso
from render_platform.gateway.app import create_app
from render_platform.gateway.identity import ANY, Terms
from tests.conftest import SEED
from tests.gateway.http import CHAT, Running, running
from tests.gateway.test_evidence_routes import flush
from tests.gateway.test_operations import usage

EXAMPLES = 25
CHAT_MODEL = {"modality": "text", "family": "llama", "model": "llama-8b", "task": "chat"}
OWNED_MODEL = {**CHAT_MODEL, "owner": "meta-llama", "model": "Llama-3.1-8B-Instruct"}
NO_INPUT = {
    *("GET /health", "GET /ready", "GET /metrics", "GET /overview", "GET /queue"),
    *("GET /models", "GET /models/aliases", "GET /v1/models", "GET /audit/checkpoint", "HEAD /audit/checkpoint"),
}
"""They take no body, no query and no part of a path: nothing that is sent could be wrong."""
FOR_BROWSERS = {
    *("/", "/page/{name}"),  # the page for people, and its files: test_page.py
    *("/schema", "/schema/{path}", "/schema/openapi.json", "/schema/oauth2-redirect.html"),  # the document itself
    "/schema-assets/{file_path}",  # scripts of its page: test_operations.py
}
"""Routes that are not in the document."""


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """A gateway that asks for keys, and one that opens everything; its limits are never reached."""
    folder = tmp_path_factory.mktemp("document") / "state"
    terms = Terms(priority_max="high", rate_per_s=100_000, burst=100_000)
    with running(folder) as made:
        create, bound = made.gateway.keys.create, {"sources": ["rack-7"], "customers": [ANY]}
        key = made.call(lambda: create("acme", ["customer", "meter", "auditor"], terms, **bound))
    with running(folder) as made:
        yield made, key


def number_of(given: Any) -> int:
    return zlib.crc32(str(given).encode("utf-8", "surrogatepass"))


def load(at: Running, mode: GenerationMode, jobs: list[str], audited: dict[str, str]) -> Any:
    """The document. What is valid by it names what is there, two times of three: else it would end at a 404."""
    api = schemathesis.openapi.from_url(f"{at.url}/schema/openapi.json")
    api.config.generation.with_security_parameters = False  # the test brings its own
    api.config.checks.negative_data_rejection.expected_statuses = ["400", "401", "403", "404", "414", "415", "422"]
    if mode == GenerationMode.NEGATIVE:
        return api

    def known(given: Any, there: dict[str, Any]) -> Any:
        if not isinstance(given, dict) or number_of(given) % 3 == 0:
            return given
        return {name: there.get(name, value) for name, value in given.items()}

    @api.hook
    def map_path_parameters(context: Any, path_parameters: Any) -> Any:
        model = OWNED_MODEL if "owner" in (path_parameters or ()) else CHAT_MODEL
        return known(path_parameters, {**model, **audited, "job_id": jobs[number_of(path_parameters) % len(jobs)]})

    @api.hook
    def map_query(context: Any, query: Any) -> Any:
        return known(query, audited) if context.operation.path == "/usage" else query

    @api.hook
    def map_body(context: Any, body: Any) -> Any:
        if isinstance(body, dict) and "data" in body:
            return known(body, usage())
        if isinstance(body, dict) and context.operation.path.startswith("/{modality}"):
            return {**body, **CHAT}
        return known(body, {"model": "llama-8b", **CHAT})

    return api


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_in_the_document(at: tuple[Running, str], mode: Any, subtests: pytest.Subtests) -> None:
    gateway, key = at
    client = gateway.client(key)
    jobs = [client.queue(input={**CHAT, **more})["id"] for more in ({}, {"do": "fail"})]
    for job_id in jobs:
        client.ended(job_id)
    flush(gateway.state)
    listed = client.get("/v1/objects").json
    audited = {"digest": listed["objects"][0]["digest"], "tile": f"0/000.p/{listed['tree_size']}"}
    audited |= {"customer_ref": client.get("/usage").json["customer_ref"], "month": iso(SystemClock().now_us())[:7]}
    left_out = set()
    for found in load(gateway, mode, jobs, audited).get_all_operations():
        operation = found.ok()
        if mode == GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
            left_out.add(operation.label)
            continue
        with subtests.test(operation.label):

            @seed(SEED)
            @settings(max_examples=EXAMPLES)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                # valid by the document is not yet valid: a model must exist, a time must lie in the past
                excluded = [positive_data_acceptance]
                headers = {"Authorization": f"Bearer {key}"}
                case.call_and_validate(headers=headers, excluded_checks=excluded, timeout=20)

            check()
    assert left_out == (NO_INPUT if mode == GenerationMode.NEGATIVE else set())


def test_every_route_is_in_the_document_or_for_browsers(at: tuple[Running, str]) -> None:
    gateway, _ = at
    app: Any = create_app(gateway.gateway)._app
    routes = {re.sub(r":\w+}", "}", route.path) for route in app.routes}
    documented = set(gateway.client().get("/schema/openapi.json").json["paths"])
    assert routes - documented == FOR_BROWSERS
    assert documented <= routes
