// Command caddy is Caddy with all standard modules, caddy-l4 and Holdfast,
// for `go run ./cmd/caddy` and for the tests. Production binaries come from
// xcaddy, as the README says.
package main

import (
	_ "time/tzdata"

	_ "github.com/mholt/caddy-l4"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/holdfast-proxy/caddy-holdfast"
)

func main() {
	caddycmd.Main()
}
