package e2e

import (
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// C25, C42: clients that leave in every unclean way and at every moment, also
// the one at which the backend's connection stands: nothing of them is left.
func TestRudeClients(t *testing.T) {
	const clients, parallel = 3000, 30
	p := startCaddy(t, "", "websocket_proxy "+rawBackend(t, echoRaw)+" "+rawBackend(t, echoRaw))
	var wg sync.WaitGroup
	for worker := range parallel {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(worker)))
			for range clients / parallel {
				rudeClient(t, p.addr, random)
			}
		})
	}
	wg.Wait()
	p.waitEmpty(t)
}

// rudeClient gets some way into a connection's life and leaves.
func rudeClient(t *testing.T, addr string, random *rand.Rand) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if random.IntN(2) == 0 {
		_ = conn.(*net.TCPConn).SetLinger(0) // RST
	}
	request := []byte(rawUpgrade(addr, ""))
	message := frame.Append(nil, ws.OpText, make([]byte, random.IntN(100_000)), true)
	cut := func(b []byte) []byte { return b[:random.IntN(len(b))] }
	switch random.IntN(6) {
	case 0: // says nothing
	case 1: // half a request
		_, _ = conn.Write(cut(request))
	case 2: // leaves while the backend is being dialed
		_, _ = conn.Write(request)
		pause(random)
	case 3: // leaves with the first bytes of the answer
		_, _ = conn.Write(request)
		_, _ = conn.Read(make([]byte, 1))
	case 4: // half a message, not waiting for the answer
		_, _ = conn.Write(append(request, cut(message)...))
		pause(random)
	case 5: // a whole one, and leaves in the middle of its echo
		_, _ = conn.Write(append(request, message...))
		_, _ = conn.Read(make([]byte, 4096))
	}
}

// pause waits for up to 2 ms: about as long as a handshake takes.
func pause(random *rand.Rand) {
	pass(time.Duration(random.IntN(2000)) * time.Microsecond)
}

// C10, C67: many connections that end at once, and return at once, leave nothing,
// and none is refused.
func TestAllAtOnce(t *testing.T) {
	const clients = 1500
	p := startCaddy(t, "", "websocket_proxy "+rawBackend(t, echoRaw))
	for range 2 {
		conns := make([]*rawConn, clients)
		var wg sync.WaitGroup
		for part := range 20 {
			wg.Go(func() {
				for i := part; i < clients; i += 20 {
					conns[i] = rawDial(t, p.addr, "")
				}
			})
		}
		wg.Wait()
		if got := p.stats(t).Total; got != clients {
			t.Errorf("connections: got %d, want %d", got, clients)
		}
		for _, c := range conns {
			_ = c.Conn.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
		p.waitEmpty(t)
	}
}
