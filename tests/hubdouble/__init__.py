"""A stand-in for the Hugging Face Hub on the loopback address, for the real huggingface_hub client.

    with HubDouble() as double:
        commit = double.add_folder("org/name", folder)            # publish without a client
        api = HfApi(endpoint=double.endpoint, token="hf_write")   # or with one, over LFS or Xet as the client chooses
        double.fault("GET", "model.safetensors", status=503)      # the next such request fails

Two servers run: the hub, and the "CDN" that large files live on, at another port and so at another origin: redirects
cross hosts, and `double.requests` shows which of them was sent a token. As on the real Hub a small file is a 307 to
`/api/resolve-cache/...`, and a large one a 302 to the CDN. A file uploaded over Xet is offered over Xet only; one
that came over LFS or from `add_folder` over HTTP.

Tokens: "hf_write" may do everything, "hf_read" may read every repository, "hf_other" is a valid one with access to
public repositories only; any other is refused as the Hub refuses an expired one.

A fault applies to requests whose method equals `method` ("*" for any) and whose path matches the regular expression
anywhere. File names are in the path on both servers, but for Xet ("/v1/xorbs/"). See `Fault` for what can go wrong.
"""

from .repositories import File, Repository
from .server import Fault, HubDouble, Request

__all__ = ["Fault", "File", "HubDouble", "Repository", "Request"]
