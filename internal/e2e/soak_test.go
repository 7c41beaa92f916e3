// This file has clients of all kinds come, stay and go for a while, as their backends do.

package e2e

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// C13, C16, C27: clients with and without TLS, of both kinds, some of which stay and some
// of which leave in every way, while backends are killed, stopped and drained. After half
// of the time and at the end those are there that stay, and nothing else has grown.
func TestSoak(t *testing.T) {
	const lodgers, visitors, name = 12, 8, "soak.test"
	half := long(4*time.Second, 5*time.Minute)
	a := testca.New(t)
	backends := []*backendProcess{startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")}
	site := fmt.Sprintf("websocket_proxy %s %s {\n name app\n resume_interval 10ms 500ms\n drain_window 500ms\n}", backends[0].addr, backends[1].addr)
	_, port, _ := net.SplitHostPort(freeAddr(t))
	secure, tunnels := "localhost:"+port, freeAddr(t)
	behindTLS := &tls.Config{Certificates: []tls.Certificate{a.Issue(t, name, name)}}
	p := startCaddy(t, fmt.Sprintf("metrics\nskip_install_trust\nlayer4 {\n%s {\n%s%s}\n}", tunnels, toSNI(name, patientBackend(t, behindTLS)), toAll(patientBackend(t, nil))),
		fmt.Sprintf("%s\n}\nhttps://%s {\n\ttls internal\n\t%s", site, secure, site))
	s := &soak{
		proxy: p, tunnels: tunnels, secure: secure, backends: backends,
		tls: &tls.Config{ServerName: name, RootCAs: a.Pool()},
	}
	if !eventually(20*time.Second, func() bool {
		c, err := s.dialTLS()
		if err == nil {
			c.Close()
		}
		return err == nil
	}) {
		t.Fatal("no certificate is issued")
	}
	found := p.value(t, "caddy_connections_sweeper_found_total")
	var webSockets []*lodger
	var through []net.Conn
	for i := range lodgers {
		webSockets = append(webSockets, s.reside(t, []func() (net.Conn, error){s.dial, s.dialTLS}[i%2]))
		through = append(through, dialTCP(t, tunnels), dialSNI(t, tunnels, name, a))
		for _, c := range through[2*i:] {
			wantEcho(t, c, "hello") // else there is nothing to match
			_ = c.SetDeadline(time.Time{})
		}
	}
	var after [2]footprint
	for round := range after {
		quit := make(chan struct{}) // closed when the visitors are to leave
		var all sync.WaitGroup
		for i := range visitors {
			random := rand.New(rand.NewPCG(uint64(round), uint64(i)))
			all.Go(func() {
				for {
					select {
					case <-quit:
						return
					default:
						s.visit(t, random)
					}
				}
			})
		}
		for began, n := time.Now(), 0; n < 3 || time.Since(began) < half; n++ {
			s.disturb(t, n)
			for _, r := range webSockets {
				r.wantEcho(t)
			}
			for i, c := range through {
				wantEcho(t, c, fmt.Sprint("lodger ", i))
			}
		}
		close(quit)
		all.Wait()
		p.waitCount(t, 3*lodgers)
		after[round] = s.measure(t)
	}
	t.Logf("visits by kind: %v, refused %d; after half the time: %+v, at the end: %+v", s.counts(), s.refused.Load(), after[0], after[1])
	const others = 8 // descriptors that come and go with Caddy and the test; visits are hundreds
	if after[0].byState != after[1].byState || after[1].goroutines > after[0].goroutines || after[1].descriptors > after[0].descriptors+others {
		t.Errorf("after half the time: %+v, at the end: %+v, want no more", after[0], after[1])
	}
	if heap := after[0].heap; after[1].heap > heap+heap/10+(8<<20) {
		t.Errorf("heap: got %d bytes after half the time, %d at the end, want 10 %% more at most", heap, after[1].heap)
	}
	resumes, moves := `caddy_connections_resumes_total{result="resumed",route="app"}`, `caddy_connections_migrations_total{result="moved",route="app"}`
	for _, series := range []string{resumes, moves} {
		if n := p.value(t, series); n == 0 {
			t.Errorf("%s: got none", series)
		}
	}
	for kind, n := range s.counts() {
		if n == 0 {
			t.Errorf("visits of kind %d: got none", kind)
		}
	}
	for _, r := range webSockets {
		r.leave()
	}
	for _, c := range through {
		c.Close()
	}
	p.waitEmpty(t)
	for _, line := range grep(p.scrape(t), "caddy_connections_active") {
		if !strings.HasSuffix(line, " 0") {
			t.Errorf("at the end: got %s", line)
		}
	}
	if got := p.value(t, "caddy_connections_sweeper_found_total"); got != found {
		t.Errorf("sweeper_found_total: got %v, want no more than the %v before", got, found)
	}
}

// patientBackend is echoBackend for clients that stay.
func patientBackend(t testing.TB, conf *tls.Config) string {
	t.Helper()
	return tcpBackend(t, func(conn net.Conn) {
		_ = conn.SetDeadline(time.Time{})
		if conf != nil {
			conn = tls.Server(conn, conf)
		}
		echo(conn)
		_ = conn.(interface{ CloseWrite() error }).CloseWrite()
	})
}

// soak is the place and its visitors.
type soak struct {
	*proxy
	tunnels, secure string
	tls             *tls.Config // of clients of tunnels
	backends        []*backendProcess
	visits          [8]atomic.Int64
	refused         atomic.Int64 // WebSockets of visitors
}

// footprint is what is there at a quiet moment.
type footprint struct {
	byState     string
	goroutines  int
	descriptors int
	heap        uint64
}

func (s *soak) measure(t testing.TB) (f footprint) {
	t.Helper()
	var own []string
	// What has ended takes a moment to go. Pipes are kept for the next tunnel.
	steady := func() bool {
		http.DefaultClient.CloseIdleConnections()
		was := f
		f = footprint{byState: fmt.Sprint(s.stats(t).ByState), descriptors: len(slices.DeleteFunc(openDescriptors(t), func(fd string) bool { return strings.Contains(fd, "pipe:") }))}
		own = strings.Split(ownGoroutines(), "\n\n")
		f.goroutines = len(own)
		pass(300 * time.Millisecond)
		return f == was
	}
	if !eventually(30*time.Second, steady) {
		t.Error("the proxy does not come to rest")
	}
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	f.heap = m.HeapInuse
	return f
}

func (s *soak) counts() (n []int64) {
	for i := range s.visits {
		n = append(n, s.visits[i].Load())
	}
	return n
}

// disturb kills, stops or drains one of the backends, in turn.
func (s *soak) disturb(t testing.TB, n int) {
	t.Helper()
	b := s.backends[n%len(s.backends)]
	switch n % 3 {
	case 0:
		kill(t, b)
		b.restart(t)
	case 1:
		term(t, b)
		b.restart(t)
	case 2:
		s.drain(t, b.addr, "app")
		pass(600 * time.Millisecond)
		if status := s.call(t, http.MethodDelete, "/connections/drain?route=app&upstream="+b.addr, nil); status != http.StatusNoContent {
			t.Errorf("end of the drain: got status %d", status)
		}
	}
}

// visit is the short stay of a client.
func (s *soak) visit(t *testing.T, random *rand.Rand) {
	kind := random.IntN(len(s.visits))
	s.visits[kind].Add(1)
	var conn net.Conn
	var err error
	switch kind {
	case 0, 1, 2:
		s.talk(t, random, s.dial)
		return
	case 3:
		s.talk(t, random, s.dialTLS)
		return
	case 4:
		rudeClient(t, s.addr, random)
		return
	case 5:
		conn, err = tls.DialWithDialer(&net.Dialer{Timeout: 20 * time.Second}, "tcp", s.tunnels, s.tls)
	default:
		conn, err = net.DialTimeout("tcp", s.tunnels, 20*time.Second)
	}
	if err != nil {
		t.Errorf("tunnel: %v", err)
		return
	}
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	sent := make([]byte, 1+random.IntN(100_000))
	var written sync.WaitGroup
	defer written.Wait()
	defer conn.Close()
	written.Go(func() { _, _ = conn.Write(sent) })
	if kind == 7 { // leaves in the middle
		_, _ = conn.Read(make([]byte, 1000))
		_ = conn.(*net.TCPConn).SetLinger(0)
		return
	}
	if _, err := io.ReadFull(conn, make([]byte, len(sent))); err != nil {
		t.Errorf("tunnel: %v", err)
		return
	}
	_ = conn.(interface{ CloseWrite() error }).CloseWrite()
	if n, err := conn.Read(make([]byte, 1)); n > 0 || err != io.EOF {
		t.Errorf("tunnel: got %d bytes, %v; want its end", n, err)
	}
}

func (s *soak) dial() (net.Conn, error) {
	return net.DialTimeout("tcp", s.addr, 20*time.Second)
}

func (s *soak) dialTLS() (net.Conn, error) {
	conf := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // the CA was made a moment ago
	return tls.DialWithDialer(&net.Dialer{Timeout: 20 * time.Second}, "tcp", s.secure, conf)
}

// upgrade opens a WebSocket over a connection, or returns nil.
func (s *soak) upgrade(conn net.Conn) *rawConn {
	host := s.addr
	if _, ok := conn.(*tls.Conn); ok {
		host = s.secure
	}
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, pathed(host, "/soak?echo=1", "")); err != nil {
		return nil
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		return nil
	}
	return &rawConn{Conn: conn, br: br, client: true}
}

// talk sends a few messages, and leaves in one of the ways there are. Its backend may be
// lost meanwhile, so an answer may come twice.
func (s *soak) talk(t *testing.T, random *rand.Rand, dial func() (net.Conn, error)) {
	conn, err := dial()
	if err != nil {
		t.Errorf("WebSocket: %v", err)
		return
	}
	defer conn.Close()
	c := s.upgrade(conn)
	if c == nil {
		s.refused.Add(1)
		return
	}
	for range random.IntN(5) {
		if _, err := c.Write(frame.Append(nil, ws.OpText, make([]byte, random.IntN(20_000)), true)); err != nil {
			t.Errorf("WebSocket: %v", err)
			return
		}
		if _, _, err := c.receive(); err != nil {
			t.Errorf("WebSocket: %v", err)
			return
		}
	}
	switch random.IntN(3) {
	case 0:
		_, _ = c.Write(frame.AppendClose(nil, 1000, "", true))
		_, _, _, _ = c.receiveClose()
	case 1:
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
	}
}
