// This file holds what tests of selection policies need: backends that say who they
// are and can be away, and clients by the thousand that ask them.

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// post is a backend that says its address in its answer, and whenever it is asked. It
// can go away with all its connections, and come back.
type post struct {
	addr string

	mu    sync.Mutex
	ln    net.Listener // nil while it is away
	done  chan struct{}
	conns map[net.Conn]struct{}
}

func startPosts(t testing.TB, n int) []*post {
	t.Helper()
	posts := make([]*post, n)
	for i := range posts {
		posts[i] = startPost(t, freeAddr(t))
	}
	return posts
}

func startPost(t testing.TB, addr string) *post {
	t.Helper()
	b := &post{addr: addr}
	b.come(t)
	t.Cleanup(b.leave)
	return b
}

// addresses returns the posts' addresses, as a Caddyfile has them.
func addresses(posts []*post) string {
	all := make([]string, len(posts))
	for i, b := range posts {
		all[i] = b.addr
	}
	return strings.Join(all, " ")
}

// come has it listen.
func (b *post) come(t testing.TB) {
	t.Helper()
	ln, err := net.Listen("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ln, b.done, b.conns = ln, make(chan struct{}), make(map[net.Conn]struct{})
	go acceptRaw(ln, b.serve, b.done)
}

// leave breaks all its connections, and refuses others.
func (b *post) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ln == nil {
		return
	}
	b.ln.Close()
	<-b.done
	b.ln = nil
	for c := range b.conns {
		c.Close()
	}
}

func (b *post) serve(r *http.Request, c *rawConn) {
	b.mu.Lock()
	here := b.ln != nil
	if here {
		b.conns[c.Conn] = struct{}{}
	}
	b.mu.Unlock()
	if !here || c.accept(r, "Backend: "+b.addr+"\r\n") != nil {
		return
	}
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		switch h.OpCode {
		case ws.OpText:
			payload = b.addr
		case ws.OpPing:
			h.OpCode = ws.OpPong
		default:
		}
		if _, err := c.Write(frame.Append(nil, h.OpCode, []byte(payload), false)); err != nil || h.OpCode == ws.OpClose {
			return
		}
	}
}

// visitor is what a client asks with, and what it was answered.
type visitor struct {
	from   string // its address; "": the usual one
	target string
	header string // lines that end with CRLF
	value  int    // that the policy looks at, for the test

	conn    *rawConn
	backend string // that answered
	cookies []*http.Cookie
}

// connect connects the visitor.
func (v *visitor) connect(addr string) error {
	var d net.Dialer
	if v.from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(v.from)}
	}
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		return err
	}
	_ = conn.SetDeadline(time.Now().Add(2 * time.Minute))
	v.conn = &rawConn{Conn: conn, br: bufio.NewReaderSize(conn, 512), client: true}
	if _, err := io.WriteString(conn, strings.Replace(rawUpgrade(addr, v.header), "/chat?x=1", v.target, 1)); err != nil {
		return err
	}
	res, err := http.ReadResponse(v.conn.br, nil)
	if err != nil {
		return err
	}
	v.backend, v.cookies = res.Header.Get("Backend"), res.Cookies()
	if res.StatusCode != http.StatusSwitchingProtocols || v.backend == "" {
		return fmt.Errorf("got status %d and backend %q, want 101 and one", res.StatusCode, v.backend)
	}
	return nil
}

// ask has the visitor's backend say who it is.
func (v *visitor) ask() error {
	if _, err := v.conn.Write(frame.Append(nil, ws.OpText, []byte("who?"), true)); err != nil {
		return err
	}
	for {
		h, payload, err := v.conn.receive()
		switch {
		case err != nil:
			return err
		case h.OpCode == ws.OpText:
			v.backend = payload
			return nil
		case h.OpCode == ws.OpClose:
			return fmt.Errorf("closed: %q", payload)
		}
	}
}

// visitors are clients of one proxy.
type visitors []*visitor

// visitorsOf returns n clients that ask with what each says.
func visitorsOf(n int, each func(i int) visitor) visitors {
	all := make(visitors, n)
	for i := range all {
		v := each(i)
		all[i] = &v
	}
	return all
}

// visit connects n clients. They go when the test ends.
func (p *proxy) visit(t testing.TB, n int, each func(i int) visitor) visitors {
	t.Helper()
	all := visitorsOf(n, each)
	t.Cleanup(all.leave)
	if err := all.connect(p.addr); err != nil {
		t.Fatal(err)
	}
	return all
}

func (all visitors) connect(addr string) error {
	return all.together(func(v *visitor) error { return v.connect(addr) })
}

// ask has the backends of all say who they are.
func (all visitors) ask(t testing.TB) {
	t.Helper()
	if err := all.together((*visitor).ask); err != nil {
		t.Fatal(err)
	}
}

// together has all do something, many at a time, and returns an error of one.
func (all visitors) together(do func(*visitor) error) error {
	errs := make([]error, len(all))
	next := make(chan int)
	var workers sync.WaitGroup
	for range 32 {
		workers.Go(func() {
			for i := range next {
				errs[i] = do(all[i])
			}
		})
	}
	for i := range all {
		next <- i
	}
	close(next)
	workers.Wait()
	for i, err := range errs {
		if err != nil {
			return fmt.Errorf("client %d: %w", i, err)
		}
	}
	return nil
}

// leave has all go without a word.
func (all visitors) leave() {
	for _, v := range all {
		if v.conn != nil {
			v.conn.Close()
		}
	}
}

// by returns how many each post has answered, or said that it has.
func (all visitors) by(posts []*post) []int {
	counts := make([]int, len(posts))
	for _, v := range all {
		for i, b := range posts {
			if b.addr == v.backend {
				counts[i]++
			}
		}
	}
	return counts
}

// loads returns how many connections the upstreams of a route have, in their order.
func (p *proxy) loads(t testing.TB, route string) (counts []int) {
	t.Helper()
	var all []struct {
		Route       string
		Connections int
	}
	p.call(t, http.MethodGet, "/connections/upstreams", &all)
	for _, u := range all {
		if u.Route == route {
			counts = append(counts, u.Connections)
		}
	}
	return counts
}

// waitLoads waits until the upstreams of a route have connections as they should.
func (p *proxy) waitLoads(t testing.TB, route, want string, fine func(counts []int) bool) {
	t.Helper()
	var counts []int
	if !eventually(20*time.Second, func() bool { counts = p.loads(t, route); return fine(counts) }) {
		t.Fatalf("connections by upstream: got %v, want %s", counts, want)
	}
}

// sum adds counts up.
func sum(counts []int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

// policySites are routes, one for each policy, under its name and with all of the
// posts. Without options it is the default policy.
func policySites(posts []*post, policies map[string]string) string {
	var site strings.Builder
	for name, policy := range policies {
		if policy != "" {
			policy = "lb_policy " + policy
		}
		fmt.Fprintf(&site, "websocket_proxy /%s* %s {\n name %s\n %s\n resume_interval 10ms 200ms\n}\n", name, addresses(posts), name, policy)
	}
	return site.String()
}
