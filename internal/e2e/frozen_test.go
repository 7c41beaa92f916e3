// This file has peers stop in the middle of things: backends and clients that are
// frozen, that read no more, or read slowly; and it resumes one connection many times.

package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// How soon a frozen peer is found, in the tests that have one.
const watchful = "ping_interval 500ms\n ping_timeout 1s\n handshake_timeout 1s\n resume_interval 20ms 200ms"

// A backend that is frozen is found by its silence and left: clients that send go on
// with the other one and miss nothing. So they do when that one freezes, is killed, or
// is thawed and reads what it had.
func TestFrozenBackend(t *testing.T) {
	for _, kinds := range [][2]string{{"coder", "node"}, {"gorilla", "python"}} {
		t.Run(kinds[0]+" and "+kinds[1], func(t *testing.T) {
			a, b := startBackend(t, kinds[0], "a"), startBackend(t, kinds[1], "b")
			s := startSenders(t, fmt.Sprintf("websocket_proxy %s %s {\n %s\n}", a.addr, b.addr, watchful), false)
			for _, frozen := range [][2]*backendProcess{{a, b}, {b, a}} {
				pass(long(700*time.Millisecond, 5*time.Second))
				frozen[0].freeze(t)
				began := time.Now()
				s.allOn(t, frozen[1].addr)
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("leaving the frozen backend took %v", took)
				}
				pass(long(300*time.Millisecond, 5*time.Second))
				if frozen[0] == a {
					kill(t, a)
					a.restart(t)
				} else {
					b.thaw(t)
				}
			}
			s.finish(t)
			s.check(t, promise{repeats: true}, []int{1006}, a, b)
		})
	}
}

// allOn waits until all connections are open on one upstream.
func (s *senders) allOn(t testing.TB, upstream string) {
	t.Helper()
	var now stats
	if !eventually(15*time.Second, func() bool {
		now = s.proxy.stats(t)
		return now.ByState["open"] == len(s.all) && now.ByUpstream[upstream] == len(s.all)
	}) {
		t.Fatalf("connections: got %+v, want all %d open on %s", now, len(s.all), upstream)
	}
}

// A frozen backend is found by clients that say nothing, too.
func TestFrozenBackendIdle(t *testing.T) {
	a := startBackend(t, "gorilla", "a")
	b := startBackend(t, "coder", "b")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n %s\n}", a.addr, b.addr, watchful))
	var conns []*rawConn
	for range 20 {
		c := rawDial(t, p.addr, "")
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		conns = append(conns, c)
		go answerPings(c)
	}
	if got := p.stats(t).ByUpstream[a.addr]; got != 10 {
		t.Fatalf("connections on the backend to be frozen: got %d, want 10", got)
	}
	pass(1200 * time.Millisecond) // they have answered a ping by then
	a.freeze(t)
	if !eventually(6*time.Second, func() bool { return p.stats(t).ByUpstream[b.addr] == 20 }) {
		t.Fatalf("connections: got %+v, want all on %s", p.stats(t), b.addr)
	}
	a.thaw(t)
	for _, c := range conns {
		c.Close()
	}
}

// answerPings owns reading a client's connection: it answers the pings and ends with it.
func answerPings(c *rawConn) {
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		if h.OpCode == ws.OpPing {
			if _, err := c.Write(frame.Append(nil, ws.OpPong, []byte(payload), true)); err != nil {
				return
			}
		}
	}
}

// A backend that reads no more is found and left, also if it goes on sending, and if
// the kernels between it and the proxy have room for all that the proxy keeps.
func TestDeafBackend(t *testing.T) {
	type deaf struct {
		name, settings string
		sends          bool
	}
	tests := []deaf{
		{"silent", "ping_interval 500ms\n ping_timeout 1s", false},
		{"sends", "ping_interval 500ms\n ping_timeout 1s", true},
		{"sends, small buffer", "ping_interval 500ms\n ping_timeout 1s\n replay_buffer 1MiB", true},
		// Without pings, what the backend's kernel has had for ping_timeout counts as read.
		{"silent, no pings", "ping_interval off\n ping_timeout 1s", false},
	}
	if full {
		tests = append(tests, deaf{"silent, no pings, small buffer", "ping_interval off\n ping_timeout 1s\n replay_buffer 1MiB", false})
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			over := make(chan struct{})
			a := rawBackend(t, func(r *http.Request, c *rawConn) { serveDeaf(r, c, test.sends, over) })
			b := startBackend(t, "coder", "b")
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n write_timeout 2s\n lb_policy round_robin\n %s\n}", a, b.addr, test.settings))
			c := dialURI(t, p.addr, "/", 0)
			if p.stats(t).ByUpstream[a] == 0 { // the next one is there
				c.Close()
				p.waitEmpty(t)
				c = dialURI(t, p.addr, "/", 0)
			}
			go answerPings(c)
			c.send(t, ws.OpText, "hear")
			pass(1200 * time.Millisecond) // it has answered a ping by then
			c.send(t, ws.OpText, "deaf")
			w := &writer{conn: c, quit: make(chan struct{}), over: make(chan struct{})}
			go w.run()
			began := time.Now()
			if eventually(12*time.Second, func() bool { return p.stats(t).ByUpstream[b.addr] == 1 }) {
				t.Logf("left after %v, %d messages sent", time.Since(began), w.sent.Load())
				close(w.quit)
				<-w.over
				b.wantNumbers(t, int(w.sent.Load()), strings.Contains(test.settings, "off"))
			} else {
				t.Errorf("the backend is not left: %+v; %d messages sent", p.connections(t), w.sent.Load())
			}
			close(over)
			_ = c.tcp().SetLinger(0) // else what it has sent is delivered first
			c.Close()
			<-w.over
		})
	}
}

// serveDeaf answers pings until it gets the message "deaf". Then it reads no more; it
// may go on sending. It ends with over.
func serveDeaf(r *http.Request, c *rawConn, sends bool, over <-chan struct{}) {
	if c.accept(r) != nil {
		return
	}
	for payload := ""; payload != "deaf"; {
		h, p, err := c.receive()
		if err != nil {
			return
		}
		if h.OpCode == ws.OpPing {
			_, _ = c.Write(frame.Append(nil, ws.OpPong, []byte(p), false)) // receive finds an end
		}
		payload = p
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-over:
			return
		case <-tick.C:
		}
		if sends {
			if _, err := c.Write(frame.Append(nil, ws.OpText, []byte("tick"), false)); err != nil {
				return
			}
		}
	}
}

// writer sends numbered messages of 16 kB.
type writer struct {
	conn *rawConn
	sent atomic.Int64
	quit chan struct{}
	over chan struct{} // closed by run
}

// run ends with quit or, as a write may take for ever, with the connection.
func (w *writer) run() {
	defer close(w.over)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		message := fmt.Sprintf("%d:%s", w.sent.Load(), strings.Repeat("x", 16_000))
		if _, err := w.conn.Write(frame.Append(nil, ws.OpText, []byte(message), true)); err != nil {
			return
		}
		w.sent.Add(1)
		select {
		case <-w.quit:
			return
		case <-tick.C:
		}
	}
}

// wantNumbers waits until the last of a writer's n messages has been recorded, and
// checks that those before it have, in order. The first ones may be missing if
// another backend may have had them.
func (b *backendProcess) wantNumbers(t testing.TB, n int, firstMissing bool) {
	t.Helper()
	var numbers []int
	if !eventually(10*time.Second, func() bool {
		numbers = nil
		for _, conns := range backendConns(t, b) {
			for _, text := range conns[len(conns)-1].texts {
				number, _, _ := strings.Cut(text, ":")
				if number, err := strconv.Atoi(number); err == nil {
					numbers = append(numbers, number)
				}
			}
		}
		return len(numbers) > 0 && numbers[len(numbers)-1] == n-1
	}) {
		t.Fatalf("messages: got %d, the last of %d is not among them", len(numbers), n)
	}
	if !firstMissing && numbers[0] != 0 {
		t.Errorf("messages: got them from number %d, want all", numbers[0])
	}
	for i, number := range numbers {
		if number != numbers[0]+i {
			t.Fatalf("messages: got number %d as number %d", number, numbers[0]+i)
		}
	}
}

// A client that is frozen is found, by its silence or, if the backend sends it more
// than its kernel takes, by that, and gives its place back.
func TestFrozenClient(t *testing.T) {
	b := startBackend(t, "coder", "b")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n ping_interval 500ms\n ping_timeout 2s\n write_timeout 2s\n}", b.addr))
	before := p.stats(t).ClosedByReason
	var clients []*nodeClient
	for _, query := range []string{"x=1", "stream=1000", "stream=20000000"} {
		clients = append(clients, startNodeClient(t, "ws://"+p.addr+"/?"+query))
	}
	pass(1500 * time.Millisecond) // they have answered a ping by then
	if got := p.stats(t).ByUpstream[b.addr]; got != len(clients) {
		t.Fatalf("connections: got %d, want %d", got, len(clients))
	}
	for _, c := range clients {
		c.signal(t, syscall.SIGSTOP)
	}
	began := time.Now()
	// Beyond the timeouts it takes time to tell them the end, which they do not read.
	if !eventually(12*time.Second, func() bool { return p.stats(t).Total == 0 }) {
		t.Errorf("they are not found: %+v", p.connections(t))
	}
	t.Logf("all are found after %v", time.Since(began))
	after := p.stats(t)
	silent, stuck := after.ClosedByReason["ping_timeout"]-before["ping_timeout"], after.ClosedByReason["write_timeout"]-before["write_timeout"]
	if silent < 2 || silent+stuck != len(clients) {
		t.Errorf("closed by reason: got %d ping_timeout, %d write_timeout; want %d in all, the first at least 2", silent, stuck, len(clients))
	}
	if got := after.ByUpstream[b.addr]; got != 0 {
		t.Errorf("connections of the upstream: got %d, want none", got)
	}
	codes := func() (codes []int) {
		for _, conns := range backendConns(t, b) {
			codes = append(codes, conns[0].code)
		}
		return codes
	}
	if !eventually(3*time.Second, func() bool { return slices.Equal(codes(), []int{1001, 1001, 1001}) }) {
		t.Errorf("close codes that the backend got: %d, want 1001", codes())
	}
	for _, c := range clients[:2] { // the third had no room for it
		c.signal(t, syscall.SIGCONT)
		if got := c.line(t); got != "closed 1001" {
			t.Errorf("a client that was thawed: got %q, want that it was closed with 1001", got)
		}
	}
}

// nodeClient is a client written with ws, a process of its own.
type nodeClient struct {
	cmd   *exec.Cmd
	lines *bufio.Scanner
}

// startNodeClient returns when it has connected.
func startNodeClient(t testing.TB, url string) *nodeClient {
	t.Helper()
	cmd := exec.Command(tool(t, "node"), "-e", nodeClientScript, url)
	cmd.Dir = "../../testdata/node" // for its packages
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	c := &nodeClient{cmd: cmd, lines: bufio.NewScanner(out)}
	if got := c.line(t); got != "open" {
		t.Fatalf("client: got %q, want that it is open", got)
	}
	return c
}

// It ends with its connection, or with standard input.
const nodeClientScript = `const ws = new (require('ws'))(process.argv[1]);
ws.on('open', () => { ws.send('here'); console.log('open'); });
ws.on('close', (code) => { console.log('closed ' + code); process.exit(0); });
ws.on('error', () => {}); // close follows
process.stdin.on('end', () => process.exit(1)).resume();`

// line returns the next line that it prints.
func (c *nodeClient) line(t testing.TB) string {
	t.Helper()
	timer := time.AfterFunc(20*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer timer.Stop()
	c.lines.Scan()
	return c.lines.Text()
}

func (c *nodeClient) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := c.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// throttled is a connection that is read slowly.
type throttled struct {
	net.Conn
	rate int // bytes per second
	read *atomic.Int64
}

func (c *throttled) Read(p []byte) (int, error) {
	const period = 50 * time.Millisecond
	pass(period)
	n, err := c.Conn.Read(p[:min(len(p), int(int64(c.rate)*int64(period)/int64(time.Second)))])
	c.read.Add(int64(n))
	return n, err
}

// dialURI opens a WebSocket; its receive buffer is as large as the kernel wants if
// receive is 0.
func dialURI(t testing.TB, addr, uri string, receive int) *rawConn {
	t.Helper()
	d := net.Dialer{Control: func(_, _ string, rc syscall.RawConn) error {
		if receive == 0 {
			return nil
		}
		return rc.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, receive) })
	}}
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(3 * time.Minute))
	if _, err := io.WriteString(conn, strings.Replace(rawUpgrade(addr, ""), "/chat?x=1", uri, 1)); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReaderSize(conn, 1<<10)
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("response: %v, %v", res, err)
	}
	return &rawConn{Conn: conn, br: br, client: true}
}

// A client that reads slowly while its backend streams is not ended for it, however
// much the kernels hold back of what it has to read, and nobody else's connection is.
func TestSlowClient(t *testing.T) {
	const rate = 100_000 // bytes per second that the clients read
	b := startBackend(t, "coder", "b")
	p := startBinary(t, "", fmt.Sprintf("websocket_proxy %s {\n ping_interval 1s\n ping_timeout 2s\n write_timeout 2s\n}", b.addr))
	clients := []*slowClient{
		{name: "stream that hardly is faster", query: "stream=120000"},
		{name: "stream", query: "stream=1000000"},
		{name: "stream, small receive buffer", query: "stream=1000000", receive: 16 << 10},
		{name: "fast stream", query: "stream=20000000"},
	}
	for _, c := range clients {
		c.start(t, p.addr, rate)
	}
	others := []*rawConn{dialURI(t, p.addr, "/", 0), dialURI(t, p.addr, "/?stream=100000", 0)}
	for _, c := range others {
		go answerPings(c)
	}
	pass(long(12*time.Second, time.Minute))
	for _, c := range clients {
		if end := c.end.Load(); end != nil {
			t.Errorf("%s: ended %s", c.name, *end)
		}
		t.Logf("%s: it has read %d kB", c.name, c.read.Load()/1000)
	}
	if got, want := p.stats(t), len(clients)+len(others); got.Total != want || got.ByState["open"] != want {
		t.Errorf("connections: got %+v, want %d", got, want)
	}
}

// slowClient is a client that reads slowly, and answers the pings that it has read.
type slowClient struct {
	name, query string
	receive     int // bytes of its receive buffer; 0: what the kernel likes

	conn *rawConn
	read atomic.Int64           // bytes
	end  atomic.Pointer[string] // once it was ended: after how long, and how
}

func (c *slowClient) start(t testing.TB, addr string, rate int) {
	t.Helper()
	c.conn = dialURI(t, addr, "/?"+c.query, c.receive)
	early, _ := c.conn.br.Peek(c.conn.br.Buffered())
	slow := &throttled{Conn: c.conn.Conn, rate: rate, read: &c.read}
	c.conn.br = bufio.NewReader(io.MultiReader(bytes.NewReader(early), slow))
	over := make(chan struct{})
	go c.run(over)
	t.Cleanup(func() {
		c.conn.Close()
		<-over
	})
}

// run owns reading. It ends with the connection.
func (c *slowClient) run(over chan<- struct{}) {
	defer close(over)
	began := time.Now()
	answerPings(c.conn)
	_, _, err := c.conn.receive()
	end := fmt.Sprintf("after %v: %v", time.Since(began), err)
	c.end.Store(&end)
}

// A connection that is resumed many times holds no more for it.
func TestManyResumes(t *testing.T) {
	const rounds, warm = 110, 10
	conns := make(chan *rawConn, 1) // of the backend; there is one at a time
	backend := rawBackend(t, func(r *http.Request, c *rawConn) {
		if c.accept(r) != nil {
			return
		}
		conns <- c
		for {
			h, payload, err := c.receive()
			if err != nil {
				return
			}
			reply := ws.NewTextFrame([]byte(payload))
			switch h.OpCode {
			case ws.OpPing:
				reply = ws.NewPongFrame([]byte(payload))
			case ws.OpClose:
				return
			default: // data
			}
			if _, err := c.Write(ws.MustCompileFrame(reply)); err != nil {
				return
			}
		}
	})
	p := startCaddy(t, "", "websocket_proxy "+backend+" {\n resume_interval 1ms 5ms\n resume_limit 0\n}")
	c := rawDial(t, p.addr, "")
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	settled := func() (goroutines, heap int) {
		var m runtime.MemStats
		least := func(old, now int) int {
			if old == 0 || now < old {
				return now
			}
			return old
		}
		for range 10 { // what ends is not always gone at once
			runtime.GC()
			runtime.ReadMemStats(&m)
			goroutines, heap = least(goroutines, runtime.NumGoroutine()), least(heap, int(m.HeapAlloc))
			pass(20 * time.Millisecond)
		}
		return goroutines, heap
	}
	var goroutines, heap int
	for n := range rounds {
		b := <-conns
		want := fmt.Sprintf("%d %s", n, strings.Repeat("x", 20_000))
		c.send(t, ws.OpText, want)
		for got := ""; got != want; {
			var err error
			if _, got, err = c.receive(); err != nil {
				t.Fatalf("round %d: %v", n, err)
			}
		}
		if n == warm {
			goroutines, heap = settled()
		}
		if n == rounds-1 {
			break
		}
		switch n % 3 {
		case 0:
			_ = b.tcp().SetLinger(0)
			b.Close()
		case 1:
			b.Close()
		case 2:
			b.sendClose(t, 1012, "")
		}
	}
	var list struct {
		Connections []struct{ Resumes int }
	}
	p.call(t, http.MethodGet, "/connections", &list)
	if got := list.Connections[0].Resumes; got != rounds-1 {
		t.Errorf("resumes: got %d, want %d", got, rounds-1)
	}
	goroutinesAfter, heapAfter := settled()
	t.Logf("after %d more resumes: %d goroutines more, %d bytes of heap more", rounds-warm-1, goroutinesAfter-goroutines, heapAfter-heap)
	if goroutinesAfter > goroutines {
		t.Errorf("goroutines: got %d, before %d", goroutinesAfter, goroutines)
	}
	if more := heapAfter - heap; more > 100_000 {
		t.Errorf("heap: got %d bytes more than before %d resumes", more, rounds-warm-1)
	}
	c.sendClose(t, 1000, "")
	_, _, _, _ = c.receiveClose()
}
