// This file tests requests of the proxy's own.

package handshake

import (
	"net/http"
	"testing"
)

// Nothing in it stands for a client.
func TestNewProbe(t *testing.T) {
	q, err := NewProbe("/a%2Fb?x=1", "app:8080", http.Header{"X-A": {"1", "2"}, "Sec-Websocket-Protocol": {"chat"}})
	if err != nil {
		t.Fatal(err)
	}
	r, _ := sent(t, q)
	if r.Method != http.MethodGet || r.RequestURI != "/a%2Fb?x=1" || r.Host != "app:8080" {
		t.Errorf("got %s %s of %s, want what was asked for", r.Method, r.RequestURI, r.Host)
	}
	compareHeader(t, r.Header, http.Header{
		"X-A": {"1", "2"}, "Sec-Websocket-Protocol": {"chat"},
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {sampleKey},
	})
}

func TestNewProbeStaysInItsLines(t *testing.T) {
	for _, c := range []struct{ target, host string }{{"/a b", "app"}, {"a", "app"}, {"/\r\nX: 1", "app"}, {"/", "app\r\nX: 1"}, {"/", "a b"}} {
		if _, err := NewProbe(c.target, c.host, nil); err == nil {
			t.Errorf("%q of %q: got no error", c.target, c.host)
		}
	}
}
