"""Tokens for an MLflow server, as an identity provider would give out: signed, for one user, until a time.

MLflow's own server knows users and passwords; what checks tokens is an `authorization_function` of whoever runs it.
This one stands for theirs, and the server is MLflow's.
"""

import os
import time

from itsdangerous import BadSignature, URLSafeSerializer

SECRET = "TEAM_TOKEN_SECRET"


def token(user: str, secret: str, lifetime_s: float) -> str:
    """A token of a user; one with a lifetime below zero has expired."""
    text = URLSafeSerializer(secret).dumps({"user": user, "expires": time.time() + lifetime_s})
    return text if isinstance(text, str) else text.decode()


def authorize():  # type: ignore[no-untyped-def]
    """Called by MLflow for every request: a bearer token, or else a user and a password."""
    from flask import request
    from mlflow.server.auth import authenticate_request_basic_auth, make_basic_auth_response
    from werkzeug.datastructures import Authorization

    shown = request.authorization
    if shown is None or shown.type != "bearer":
        return authenticate_request_basic_auth()
    try:
        claims = URLSafeSerializer(os.environ[SECRET]).loads(shown.token)
    except BadSignature:
        return make_basic_auth_response()
    if claims["expires"] < time.time():
        return make_basic_auth_response()
    return Authorization("basic", {"username": claims["user"], "password": None})
