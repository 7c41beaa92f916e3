// This file tests header_down.

package handshake

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
)

// downTo returns what a client with the request r gets of a backend's answer, beside
// what other handlers have set.
func downTo(t *testing.T, r *http.Request, h *Headers, script string, set http.Header) http.Header {
	t.Helper()
	res, err := asked(t).Do(&scripted{script: script}, testUpstream)
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	for name, values := range set {
		w.Header()[name] = slices.Clone(values)
	}
	if down := h.Down(r); res.Upgraded {
		res.AnswerHeader(w.Header(), sampleKey, down)
	} else {
		res.RelayHeader(w.Header(), down)
	}
	return w.Header()
}

// answers are a 101 and a refusal with the same headers.
func answers() map[string]string {
	lines := []string{"X-A: 1", "X-A: 2", "Set-Cookie: a=1", "Location: http://inner/", "Server: backend", "Sec-WebSocket-Protocol: chat"}
	refusal := "HTTP/1.1 403 Forbidden\r\n"
	for _, line := range lines {
		refusal += line + "\r\n"
	}
	return map[string]string{"101": switching(lines...), "refusal": refusal + "Content-Length: 2\r\nConnection: X-Hop\r\nX-Hop: 1\r\n\r\nno"}
}

func TestHeaderDown(t *testing.T) {
	for _, test := range []struct {
		name string
		ops  headers.HeaderOps
		want http.Header // nil: no such field
	}{
		{"none", headers.HeaderOps{}, http.Header{"X-A": {"1", "2"}, "X-Ours": {"kept"}, "Location": {"http://inner/"}}},
		{"set", headers.HeaderOps{Set: http.Header{"x-a": {"3"}, "X-B": {"4"}}}, http.Header{"X-A": {"3"}, "X-B": {"4"}}},
		{"add", headers.HeaderOps{Add: http.Header{"Set-Cookie": {"b=2"}}}, http.Header{"Set-Cookie": {"ours=1", "a=1", "b=2"}}},
		{"replace", headers.HeaderOps{Replace: map[string][]headers.Replacement{"Location": {{SearchRegexp: "^http:", Replace: "https:"}}}}, http.Header{"Location": {"https://inner/"}}},
		{"delete", headers.HeaderOps{Delete: []string{"x-*", "Set-Cookie"}}, http.Header{"X-A": nil, "X-Ours": {"kept"}, "Set-Cookie": {"ours=1"}}},
		{"delete all", headers.HeaderOps{Delete: []string{"*"}}, http.Header{"X-A": nil, "X-Ours": {"kept"}, "Set-Cookie": {"ours=1"}, "Server": {"Caddy"}}},
		{"of the request", headers.HeaderOps{Set: http.Header{"X-B": {"{http.request.host} {http.request.header.X-Client}"}}}, http.Header{"X-B": {"example.com {http.request.method}"}}},
		{"of the upstream", headers.HeaderOps{Set: http.Header{"X-B": {hostport + " " + host + " " + port + " " + address}}}, http.Header{"X-B": {"10.0.0.1:8080 10.0.0.1 8080 tcp/10.0.0.1:8080"}}},
		{"of the answer", headers.HeaderOps{Set: http.Header{"X-B": {"{http.reverse_proxy.header.X-A}"}}}, http.Header{"X-B": {"1,2"}}},
	} {
		for kind, script := range answers() {
			t.Run(test.name+"/"+kind, func(t *testing.T) {
				h := provisioned(t, &Headers{Response: &headers.RespHeaderOps{HeaderOps: &test.ops}})
				ours := http.Header{"X-Ours": {"kept"}, "Set-Cookie": {"ours=1"}, "Server": {"Caddy"}}
				got := downTo(t, prepared(t, get, "X-Client: {http.request.method}"), h, script, ours)
				for name, want := range test.want {
					if !slices.Equal(got[name], want) {
						t.Errorf("%s: got %q, want %q", name, got[name], want)
					}
				}
				if got.Get("X-Hop") != "" {
					t.Error("got a header of one hop")
				}
			})
		}
	}
}

func TestHeaderDownMayRequireAnAnswer(t *testing.T) {
	for _, test := range []struct {
		name    string
		require caddyhttp.ResponseMatcher
		want    map[string]bool
	}{
		{"status of the 101", caddyhttp.ResponseMatcher{StatusCode: []int{101}}, map[string]bool{"101": true}},
		{"class of the refusal", caddyhttp.ResponseMatcher{StatusCode: []int{4}}, map[string]bool{"refusal": true}},
		{"either", caddyhttp.ResponseMatcher{StatusCode: []int{1, 403}}, map[string]bool{"101": true, "refusal": true}},
		{"header", caddyhttp.ResponseMatcher{Headers: http.Header{"Server": {"back*"}}}, map[string]bool{"101": true, "refusal": true}},
		{"header of the handshake", caddyhttp.ResponseMatcher{Headers: http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {"chat"}}}, map[string]bool{"101": true}},
		{"header that is there", caddyhttp.ResponseMatcher{Headers: http.Header{"X-A": nil}}, nil},
		{"header of ours", caddyhttp.ResponseMatcher{Headers: http.Header{"X-Ours": {"*"}}}, nil},
	} {
		for kind, script := range answers() {
			h := provisioned(t, &Headers{Response: &headers.RespHeaderOps{
				HeaderOps: &headers.HeaderOps{Set: http.Header{"X-Done": {"1"}}}, Require: &test.require,
			}})
			got := downTo(t, prepared(t, get), h, script, http.Header{"X-Ours": {"1"}}).Get("X-Done") == "1"
			if got != test.want[kind] {
				t.Errorf("%s: %s: got applied %t, want %t", test.name, kind, got, test.want[kind])
			}
		}
	}
}

// Operations can neither remove nor forge what the handshake consists of, nor how
// long a body is.
func TestHeaderDownCannotTouchTheHandshake(t *testing.T) {
	own := []string{"Upgrade", "Connection", "Sec-Websocket-Accept", "Sec-Websocket-Protocol", "Sec-Websocket-Extensions", "Sec-Websocket-Version", "Content-Length", "Transfer-Encoding"}
	forge, remove := &headers.HeaderOps{Set: http.Header{}, Add: http.Header{}}, new(headers.HeaderOps)
	for _, name := range own {
		forge.Set[name], forge.Add[name] = []string{"7"}, []string{"chunked"}
		remove.Delete = append(remove.Delete, name)
	}
	want := map[string]http.Header{
		"101": {
			"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Accept": {sampleAccept},
			"Sec-Websocket-Protocol": {"chat"},
		},
		"refusal": {"Content-Length": {"2"}},
	}
	for name, ops := range map[string]*headers.HeaderOps{
		"forge": forge, "remove": remove, "remove all": {Delete: []string{"*"}},
		"replace": {Replace: map[string][]headers.Replacement{"*": {{SearchRegexp: ".+", Replace: "x"}}}},
	} {
		for kind, script := range answers() {
			t.Run(name+"/"+kind, func(t *testing.T) {
				h := provisioned(t, &Headers{Response: &headers.RespHeaderOps{HeaderOps: ops}})
				got := http.Header{}
				for field, values := range downTo(t, prepared(t, get), h, script, nil) {
					field = http.CanonicalHeaderKey(field) // the handshake's are spelled as in RFC 6455
					got[field] = append(got[field], values...)
				}
				for _, field := range own {
					if kind == "refusal" && field != "Content-Length" && field != "Transfer-Encoding" {
						continue // there is no handshake
					}
					if !slices.Equal(got[field], want[kind][field]) {
						t.Errorf("%s: got %q, want %q", field, got[field], want[kind][field])
					}
				}
			})
		}
	}
}

// A body whose length the backend did not say has none.
func TestHeaderDownCannotDeclareALength(t *testing.T) {
	h := provisioned(t, &Headers{Response: &headers.RespHeaderOps{HeaderOps: &headers.HeaderOps{Set: http.Header{"Content-Length": {"7"}}}}})
	const chunked = "HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n"
	if got, ok := downTo(t, prepared(t, get), h, chunked, nil)["Content-Length"]; ok {
		t.Errorf("got Content-Length %q, want none", got)
	}
}

// Handlers around this one, like those that log, may use what reverse_proxy would
// have told them.
func TestPlaceholdersAreLeftForOtherHandlers(t *testing.T) {
	r := prepared(t, get)
	repl := replacer(r)
	repl.Set("http.reverse_proxy.upstream.hostport", "of an earlier handler")
	repl.Set("http.reverse_proxy.header.X-Stale", "of an earlier handler")
	downTo(t, r, nil, answers()["101"], nil)
	for name, want := range map[string]string{
		"upstream.address": "tcp/10.0.0.1:8080", "upstream.hostport": "10.0.0.1:8080", "upstream.host": "10.0.0.1", "upstream.port": "8080",
		"status_code": "101", "status_text": "101 Switching Protocols", "header.Server": "backend",
	} {
		if got, _ := repl.GetString("http.reverse_proxy." + name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"upstream.latency", "upstream.latency_ms"} {
		if got, _ := repl.GetString("http.reverse_proxy." + name); got == "" || got == "0s" || got == "0" {
			t.Errorf("%s: got %q, want the time that the answer took", name, got)
		}
	}
	if got, ok := repl.Get("http.reverse_proxy.header.X-Stale"); ok {
		t.Errorf("got a header of another answer: %v", got)
	}
}
