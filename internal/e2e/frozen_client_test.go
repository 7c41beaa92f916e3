// This file has clients stop in the middle of things: they are frozen, or read slowly.

package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A client that is frozen is found, by its silence or, if the backend sends it more
// than its kernel takes, by that, and gives its place back.
func TestFrozenClient(t *testing.T) {
	b := startBackend(t, "coder", "b")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n ping_interval 500ms\n ping_timeout 3s\n write_timeout 3s\n}", b.addr))
	before := p.stats(t).ClosedByReason
	var clients []*nodeClient
	for _, query := range []string{"x=1", "stream=1000", "stream=20000000"} {
		clients = append(clients, startNodeClient(t, "ws://"+p.addr+"/?"+query))
	}
	pass(1500 * time.Millisecond) // in which they answer pings, however much comes before those
	if got := p.stats(t).ByUpstream[b.addr]; got != len(clients) {
		t.Fatalf("connections: got %d, want %d", got, len(clients))
	}
	for _, c := range clients {
		c.signal(t, syscall.SIGSTOP)
	}
	began := time.Now()
	// Beyond the timeouts it takes time to tell them the end, which they do not read.
	if !eventually(30*time.Second, func() bool { return p.stats(t).Total == 0 }) {
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
	if !eventually(20*time.Second, func() bool { return slices.Equal(codes(), []int{1001, 1001, 1001}) }) {
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

// throttled is a connection that is read slowly, as fast on a machine that is busy.
type throttled struct {
	net.Conn
	began time.Time
	rate  int // bytes per second
	read  *atomic.Int64
}

func (c *throttled) Read(p []byte) (int, error) {
	var due int // by now
	for due <= 0 {
		pass(50 * time.Millisecond)
		due = int(time.Since(c.began).Seconds()*float64(c.rate)) - int(c.read.Load())
	}
	n, err := c.Conn.Read(p[:min(len(p), due)])
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
	// A kernel whose buffer was full takes more only when a sixteenth of it is free, which
	// at that rate may be 4 s.
	p := startBinary(t, "", fmt.Sprintf("websocket_proxy %s {\n ping_interval 1s\n ping_timeout 5s\n write_timeout 5s\n}", b.addr))
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
	slow := &throttled{Conn: c.conn.Conn, began: time.Now(), rate: rate, read: &c.read}
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
