// This file tests how much a connection keeps of its client's request.

package handshake

import (
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// A client cannot make the proxy keep many times what it sends, by a header of as many
// values as fit.
func TestARequestKeepsNotMuchMoreThanItIs(t *testing.T) {
	const size, count = 1 << 20, 8
	many := strings.Repeat("a,", size/2)
	for _, name := range []string{"Sec-Websocket-Protocol", "Sec-Websocket-Extensions", "X-Forwarded-For", "Cookie"} {
		var kept []*Request
		before := heap()
		for range count {
			r := httptest.NewRequest(http.MethodGet, "http://example.com/chat", http.NoBody)
			r.Header.Set(name, many)
			q, err := NewRequest(r, Client{ID: "id", Trusted: true}, deflate.Negotiate(r.Header["Sec-Websocket-Extensions"], deflate.On), nil)
			if err != nil {
				t.Fatal(err)
			}
			kept = append(kept, q)
		}
		if each := (heap() - before) / count; each > 3*size {
			t.Errorf("%s: got %d bytes kept of a request of %d", name, each, size)
		}
		runtime.KeepAlive(kept)
	}
}

// heap returns how many bytes are in use.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // pools forget at the second
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
