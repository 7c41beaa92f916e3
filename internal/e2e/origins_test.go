// This file tests allowed_origins.

package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// A page of another origin is refused with 403 before any dial, and what has no origin
// is let in.
func TestAllowedOrigins(t *testing.T) {
	backend := newCountedBackend(t, echoRaw)
	p := startCaddy(t, "metrics", "websocket_proxy "+backend.addr+" {\n name app\n allowed_origins example.com https://*.example.org http://[2001:db8::1]:8080 null\n}\n"+
		"handle_errors {\n respond \"custom {err.status_code}\"\n}")
	refused := 0
	for _, tt := range []struct {
		origin string // "": none
		in     bool
	}{
		{"", true},
		{"https://example.com", true},
		{"http://example.com", true},
		{"HTTPS://Example.COM", true},
		{"https://chat.example.org", true},
		{"http://[2001:db8::1]:8080", true},
		{"null", true},
		{"https://example.com:8443", false},
		{"https://evil.com", false},
		{"https://example.com.evil.com", false},
		{"https://notexample.com", false},
		{"https://evil.com/example.com", false},
		{"https://example.com@evil.com", false},
		{"https://example.org", false},
		{"http://chat.example.org", false},
		{"http://[2001:db8::2]:8080", false},
		{"file://", false},
		{"example.com", false},
		{"https://example.com, https://evil.com", false},
		{"https://example.com\r\nOrigin: https://evil.com", false},
		{"https://example.com\r\nOrigin: https://example.com", false},
	} {
		t.Run(strings.NewReplacer("/", "_", "\r\n", " ").Replace(tt.origin), func(t *testing.T) {
			before := backend.dials.Load()
			extra := ""
			if tt.origin != "" {
				extra = "Origin: " + tt.origin + "\r\n"
			}
			res, c := rawRequest(t, p.addr, rawUpgrade(p.addr, extra))
			if tt.in {
				if res.StatusCode != http.StatusSwitchingProtocols {
					t.Fatalf("status: got %d, want 101", res.StatusCode)
				}
				checkEcho(t, c)
				return
			}
			refused++
			if got := body(t, res); res.StatusCode != http.StatusForbidden || got != "custom 403" || res.Header.Get("Retry-After") != "" {
				t.Errorf("got %d %q, want 403", res.StatusCode, got)
			}
			if backend.dials.Load() != before {
				t.Error("the backend was dialed")
			}
		})
	}
	p.wantMetrics(t, map[string]string{
		`caddy_connections_refused_total{kind="websocket",reason="origin",route="app"}`: fmt.Sprint(refused),
	})
}

// The origin is looked at after the rest of the handshake and before the limits, of
// which a page that is refused takes nothing. default_origin does not count.
func TestOriginBeforeLimits(t *testing.T) {
	p := startCaddy(t, "metrics", "websocket_proxy "+rawBackend(t, echoRaw)+" {\n name app\n allowed_origins example.com\n default_origin https://evil.com\n max_connections 1\n max_connections_per_ip 1\n}")
	const good, evil = "Origin: https://example.com\r\n", "Origin: https://evil.com\r\n"
	wants := func(status int, request string) {
		t.Helper()
		if res, _ := rawRequest(t, p.addr, request); res.StatusCode != status {
			t.Errorf("status: got %d, want %d", res.StatusCode, status)
		}
	}
	for range 3 {
		wants(http.StatusForbidden, rawUpgrade(p.addr, evil))
	}
	wants(http.StatusUpgradeRequired, strings.Replace(rawUpgrade(p.addr, evil), "Version: 13", "Version: 8", 1))
	c := rawDial(t, p.addr, good)
	wants(http.StatusForbidden, rawUpgrade(p.addr, evil))
	wants(http.StatusTooManyRequests, rawUpgrade(p.addr, good))
	series := func(reason string) string {
		return fmt.Sprintf(`caddy_connections_refused_total{kind="websocket",reason=%q,route="app"}`, reason)
	}
	p.wantMetrics(t, map[string]string{series("origin"): "4", series("handshake"): "1", series("max_connections_per_ip"): "1"})
	checkEcho(t, c)
	p.waitEmpty(t)
	checkEcho(t, rawDial(t, p.addr, ""))
}
