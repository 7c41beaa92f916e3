// This file tests the handler among the other handlers of a site.

package e2e

import (
	"net/http"
	"strings"
	"testing"

	"github.com/gobwas/ws"
)

// What stands before the handler acts on a WebSocket as on any request: authentication,
// rewriting, prefixes, subroutes, headers, limits of a body; and what is no WebSocket
// goes on.
func TestAmongOtherHandlers(t *testing.T) {
	b := startPatient(t)
	const (
		// The hash is of "secret", at the lowest cost.
		hash  = "$2a$04$dntJedsaURv0w2.yRZcw2OVHnkhmrfkvetxdMk2VI92xCFBkXa4Ru"
		basic = "Authorization: Basic dXNlcjpzZWNyZXQ=" // user:secret
	)
	to := "websocket_proxy " + b.addr
	for _, tt := range []struct {
		name, site, path, header string
		status                   int
		want                     string // the target at the backend
	}{
		{"rewrite", "rewrite * /inner{uri}\n" + to, "/a?b=c", "", 101, "/inner/a?b=c"},
		{"uri", "uri strip_prefix /app\n" + to, "/app/a", "", 101, "/a"},
		{"handle_path", "handle_path /app/* {\n " + to + "\n}", "/app/a?b", "", 101, "/a?b"},
		{"handle_path of another path", "handle_path /app/* {\n " + to + "\n}\nrespond 418", "/other", "", 418, ""},
		{"basic_auth", "basic_auth {\n user HASH\n}\n" + to, "/a", basic, 101, "/a"},
		{"basic_auth without a password", "basic_auth {\n user HASH\n}\n" + to, "/a", "", 401, ""},
		{"basic_auth with a wrong one", "basic_auth {\n user HASH\n}\n" + to, "/a", "Authorization: Basic dXNlcjp3cm9uZw==", 401, ""},
		{"subroute", "route /a* {\n route {\n request_header X-Route inner\n " + to + "\n }\n respond 418\n}", "/a", "", 101, "/a"},
		{"request_header", "request_header X-Route inner\n" + to, "/a", "", 101, "/a"},
		{"request_body", "request_body {\n max_size 10B\n}\n" + to, "/a", "", 101, "/a"},
		{"matcher of a header", "route {\n @ws header X-Route yes\n websocket_proxy @ws " + b.addr + "\n respond 418\n}", "/a", "X-Route: yes", 101, "/a"},
		{"encode and log", "encode gzip\nlog {\n output discard\n}\n" + to, "/a", "Accept-Encoding: gzip", 101, "/a"},
		{"templates and intercept", "route {\n templates\n intercept {\n @error status 500\n handle_response @error {\n respond 418\n }\n }\n " + to + "\n}", "/a", "", 101, "/a"},
		{"matcher of another header", "route {\n @ws header X-Route yes\n websocket_proxy @ws " + b.addr + "\n respond 418\n}", "/a", "X-Route: no", 418, ""},
		{"no WebSocket", "route {\n " + to + "\n respond 418\n}", "/plain", "plain", 418, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startCaddy(t, "", strings.ReplaceAll(tt.site, "HASH", hash))
			before := len(b.all())
			header := []string{"Host: " + p.addr}
			if tt.header != "" {
				header = append(header, tt.header)
			}
			request := upgradeTo(tt.path, header...)
			if tt.header == "plain" {
				request = "GET " + tt.path + " HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n"
			}
			res, c := rawRequest(t, p.addr, request)
			if res.StatusCode != tt.status {
				t.Fatalf("status: got %d, want %d", res.StatusCode, tt.status)
			}
			asked := b.all()[before:]
			if tt.status != http.StatusSwitchingProtocols {
				if len(asked) != 0 {
					t.Errorf("the backend was asked for %s", asked[0].RequestURI)
				}
				return
			}
			if len(asked) != 1 || asked[0].RequestURI != tt.want {
				t.Fatalf("the backend: got %d requests, %+v; want one for %s", len(asked), asked, tt.want)
			}
			if strings.Contains(tt.site, "request_header") && asked[0].Header.Get("X-Route") != "inner" {
				t.Errorf("X-Route: got %q, want inner", asked[0].Header.Get("X-Route"))
			}
			// More than any limit of a request's body.
			c.send(t, ws.OpText, strings.Repeat("x", 1000))
			c.wantText(t, strings.Repeat("x", 1000))
			c.sendClose(t, 1000, "")
			if code, _, _, err := c.receiveClose(); err != nil || code != 1000 {
				t.Errorf("close: got %d, %v; want 1000", code, err)
			}
		})
	}
}
