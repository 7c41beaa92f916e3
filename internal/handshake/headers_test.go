// This file tests the settings: their syntax, by what the installed reverse_proxy
// makes of the same lines, and what is refused.

package handshake

import (
	"context"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// parsed reads a block of header_up and header_down.
func parsed(text string) (*Headers, error) {
	h := new(Headers)
	d := caddyfile.NewTestDispenser("websocket_proxy {\n" + text + "\n}")
	d.Next()
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch d.Val() {
		case "header_up":
			err = h.ParseUp(d)
		case "header_down":
			err = h.ParseDown(d)
		default:
			err = d.Errf("unrecognized subdirective %q", d.Val())
		}
		if err != nil {
			return nil, err
		}
	}
	return h, nil
}

func TestSyntaxIsThatOfReverseProxy(t *testing.T) {
	for _, text := range []string{
		"header_up X-A 1",
		"header_up +X-A 1\nheader_up +X-A 2\nheader_up X-A 3",
		"header_up -X-*\nheader_up -Cookie\nheader_down -Server",
		"header_up X-A",
		"header_up X-A \"\"",
		"header_up x-a ^(.*)$ <$1>\nheader_up X-A b c\nheader_up +X-B b c",
		"header_up Host {http.reverse_proxy.upstream.hostport}",
		"header_up >X-A 1",
		"header_down X-A 1\nheader_down +Set-Cookie a=1\nheader_down +Set-Cookie b=2",
		"header_down Location http:// https://",
		"header_down >X-A 1",
		"header_up X-A \"two words {http.request.host}\"\nheader_down X-B 2\nheader_up X-C 3",
	} {
		t.Run(text, func(t *testing.T) {
			got, err := parsed(text)
			if err != nil {
				t.Fatal(err)
			}
			theirs := new(reverseproxy.Handler)
			if err := theirs.UnmarshalCaddyfile(caddyfile.NewTestDispenser("reverse_proxy localhost:1 {\n" + text + "\n}")); err != nil {
				t.Fatal(err)
			}
			want := &Headers{Request: theirs.Headers.Request, Response: theirs.Headers.Response}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got %s, want %s", asJSON(t, got), asJSON(t, want))
			}
			if ours, others := asJSON(t, got), asJSON(t, theirs.Headers); ours != others {
				t.Errorf("got JSON %s, want %s", ours, others)
			}
		})
	}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestSyntaxErrorsNameTheSubdirective(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"header_up", "header_up: missing argument"},
		{"header_down", "header_down: missing argument"},
		{"header_up A b c d", `header_up: surplus argument "d"`},
		{"header_down A b c d e", `header_down: surplus argument "d"`},
		{"header_up ?A b", "header_up: ?A: the default header modifier"},
		{"header_down ?A b", "header_down: ?A: the default header modifier"}, // reverse_proxy has it neither
	} {
		if _, err := parsed(test.text); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got error %v, want %s", test.text, err, test.want)
		}
	}
}

// What reverse_proxy warns of, and what has no effect here.
func TestRemarks(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"X-Forwarded-For {remote_host}", "unnecessary"},
		{"x-forwarded-for {http.request.remote}", "unnecessary"},
		{"X-Forwarded-Proto {scheme}", "unnecessary"},
		{"X-Forwarded-Host {http.request.hostport}", "unnecessary"},
		{"Connection {http.request.header.Connection}", "no effect"},
		{"-upgrade", "no effect"},
		{"+Sec-WebSocket-Key x", "no effect"},
		{"Holdfast-Connection x", "no effect"},
		{"X-Forwarded-For {http.request.host}", ""},
		{"+X-Forwarded-For {remote_host}", ""},
		{"X-Forwarded-Proto https", ""},
		{"-X-Forwarded-For", ""},
		{"Host {http.reverse_proxy.upstream.hostport}", ""},
		{"Sec-WebSocket-Protocol chat", ""},
	} {
		got := remarkUp(strings.Fields(test.text))
		if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s: got %q, want %q", test.text, got, test.want)
		}
	}
}

func TestProvisionRefusesWhatCannotWork(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	for _, test := range []struct{ name, config, want string }{
		{"nothing", `{}`, ""},
		{"response without operations", `{"response": {"require": {"status_code": [403]}}}`, ""},
		{"regular expression", `{"request": {"replace": {"X-A": [{"search_regexp": "("}]}}}`, "header_up: replacement 0 for header field 'X-A'"},
		{"of the response", `{"response": {"replace": {"X-A": [{"search_regexp": "("}]}}}`, "header_down: replacement 0"},
		{"two searches", `{"request": {"replace": {"X-A": [{"search": "a", "search_regexp": "b"}]}}}`, "header_up: cannot specify both"},
		{"two searches in the response", `{"response": {"replace": {"X-A": [{"search": "a", "search_regexp": "b"}]}}}`, "header_down: cannot specify both"},
		{"field name", `{"request": {"set": {"Host:": ["x"]}}}`, `header_up: invalid field name "Host:"`},
		{"field name that is added", `{"response": {"add": {"X A": ["x"]}}}`, `header_down: invalid field name "X A"`},
		{"field name that is deleted", `{"request": {"delete": [""]}}`, `header_up: invalid field name ""`},
		{"field name that is replaced", `{"request": {"replace": {"X A": [{"search": "a"}]}}}`, `header_up: invalid field name "X A"`},
		{"any field", `{"request": {"delete": ["X-*"], "replace": {"*": [{"search": "a"}]}}}`, ""},
		{"field name by a placeholder", `{"request": {"set": {"X-{http.request.method}": ["x"]}}}`, ""},
		{"value", `{"request": {"set": {"X-A": ["a\nb"]}}}`, `header_up: invalid value "a\nb" of X-A`},
		{"upstream's placeholders", `{"request": {"set": {"X-A": ["{http.reverse_proxy.upstream.address}"]}}}`, ""},
		{"unsupported one", `{"request": {"set": {"X-A": ["{http.reverse_proxy.upstream.requests}"]}}}`, "header_up: unsupported placeholder {http.reverse_proxy.upstream.requests}: of an upstream there are address, host, hostport, port"},
		{"unsupported one, escaped", `{"request": {"set": {"X-A": ["\\{http.reverse_proxy.upstream.requests}"]}}}`, ""},
		{"of a replacement", `{"request": {"replace": {"X-A": [{"search": "{http.reverse_proxy.upstream.fails}"}]}}}`, "header_up: unsupported placeholder"},
		{"of a removal", `{"request": {"delete": ["{http.reverse_proxy.upstream.fails}"]}}`, "header_up: unsupported placeholder"},
		{"latency of the response", `{"response": {"set": {"X-A": ["{http.reverse_proxy.upstream.latency}"]}}}`, ""},
		{"default origin", `{"default_origin": "https://example.com:8443"}`, ""},
		{"default origin null", `{"default_origin": "null"}`, ""},
		{"default origin of the request", `{"default_origin": "{http.request.scheme}://example.com"}`, ""},
		{"default origin without a scheme", `{"default_origin": "example.com"}`, `default_origin: invalid origin "example.com"`},
		{"default origin with a path", `{"default_origin": "http://127.0.0.1/hello"}`, ""},
		{"default origin without a host", `{"default_origin": "https:///hello"}`, `default_origin: invalid origin "https:///hello"`},
		{"default origin that is no header", `{"default_origin": "https://example.com/\n"}`, `default_origin: invalid origin "https://example.com/\n"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := new(Headers)
			if err := json.Unmarshal([]byte(test.config), h); err != nil {
				t.Fatal(err)
			}
			err := h.Provision(ctx)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.HasPrefix(err.Error(), test.want)) {
				t.Errorf("got error %v, want %s", err, test.want)
			}
		})
	}
	if err := (*Headers)(nil).Provision(ctx); err != nil {
		t.Errorf("none: got error %v", err)
	}
}
