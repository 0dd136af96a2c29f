"""Whatever a request's headers hold, it is somebody's or it is refused: nothing else is raised."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.gateway.identity import Unauthorized
from tests.gateway.test_identity import NOW_S, SIGNER, World
from tests.gateway.test_identity_tokens import token_of

STARTS = ("Bearer ", "Bearer rp_", "Bearer eyJ", "rp_0123456789abcdef_", "Bearer eyJhbGciOiJFZERTQSJ9.eyJ")
RESTS = st.text() | st.text(string.ascii_letters + string.digits + "-_.", max_size=99)
HEADERS = st.none() | st.text() | st.builds(str.__add__, st.sampled_from(STARTS), RESTS)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("identity"))
    yield made
    made.database.close()


@given(authorization=HEADERS, x_api_key=HEADERS)
def test_any_headers_give_a_principal_or_unauthorized(
    shared: World, authorization: str | None, x_api_key: str | None
) -> None:
    try:
        shared.identity.authenticate(authorization, x_api_key)
    except Unauthorized as error:
        shown = str(error)
    else:
        return
    assert not any(text in shown for text in (authorization, x_api_key) if text is not None and len(text) > 20)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
CLAIMS = st.fixed_dictionaries({}, optional=dict.fromkeys(("iss", "aud", "sub", "exp", "nbf", "iat"), JSON))
HEADER = st.fixed_dictionaries({}, optional=dict.fromkeys(("alg", "kid", "typ", "crit", "jwk"), JSON))


@given(header=HEADER, claims=CLAIMS)
def test_any_json_under_our_own_signature_gives_a_principal_or_unauthorized(
    shared: World, header: dict[str, Any], claims: dict[str, Any]
) -> None:
    good = {"iss": "https://id.example", "aud": "render", "sub": "acme", "exp": NOW_S + 600}
    token = token_of(json.dumps({"alg": "EdDSA"} | header), json.dumps(good | claims), SIGNER)
    try:
        found = shared.identity.authenticate(f"Bearer {token}", None)
    except Unauthorized:
        return
    assert found.issuer == "example"
    assert found.customer_id == (good | claims)["sub"]
