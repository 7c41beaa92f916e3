// This file has what the benchmark of relays runs: the relays, their clients and their
// backend, and how turns are compared.

package e2e

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

// contender is a proxy that runs.
type contender struct {
	name   string
	addr   string
	pid    int
	memory func(b testing.TB) memory
	stop   func()
}

// memory is a process's, in KiB.
type memory struct {
	resident float64 // settled
	stacks   float64 // of goroutines, in it
}

// since is what each of n connections has cost.
func (m memory) since(before memory, n float64) memory {
	return memory{(m.resident - before.resident) / n, (m.stacks - before.stacks) / n}
}

// contenders are those that are compared, to the first one.
var contenders = []struct {
	name  string
	start func(b testing.TB, name, backend string) *contender
}{
	{"sni_passthrough", caddyRelay("sni_passthrough")},
	{"l4proxy", caddyRelay("proxy")},
	{"haproxy", haproxyRelay("")},
	{"haproxy-1-thread", haproxyRelay("nbthread 1")},
}

// relayedName is the server name that all clients ask for.
const relayedName = "relayed.test"

// caddyRelay starts the built Caddy with a handler of caddy-l4 behind its TLS matcher.
func caddyRelay(handler string) func(b testing.TB, name, backend string) *contender {
	return func(b testing.TB, name, backend string) *contender {
		addr := freeAddr(b)
		routes := "@relayed tls sni " + relayedName + "\nroute @relayed {\n" + handler + " " + backend + "\n}\n"
		p := startBinary(b, "layer4 {\n"+addr+" {\n"+routes+"}\n}", "respond ok")
		r := &contender{name: name, addr: addr, pid: p.cmd.Process.Pid}
		r.memory = func(b testing.TB) memory { return memory{settledMemory(b, p), goMemory(b, p, "stack_inuse")} }
		r.stop = func() { _ = p.cmd.Process.Kill(); <-p.exited }
		return r
	}
}

// haproxyRelay starts HAProxy, with the same job.
func haproxyRelay(global string) func(b testing.TB, name, backend string) *contender {
	return func(b testing.TB, name, backend string) *contender {
		path, err := exec.LookPath("haproxy")
		if err != nil {
			b.Fatalf("%v; on Debian: apt-get install haproxy", err)
		}
		addr := freeAddr(b)
		config := filepath.Join(b.TempDir(), "haproxy.cfg")
		text := fmt.Sprintf(`global
	maxconn 4000
	%s
defaults
	mode tcp
	option splice-request
	option splice-response
	timeout connect 10s
	timeout client 1h
	timeout server 1h
frontend clients
	bind %s
	tcp-request inspect-delay 10s
	tcp-request content accept if { req.ssl_hello_type 1 }
	use_backend relayed if { req.ssl_sni -i %s }
backend relayed
	server backend %s
`, global, addr, relayedName, backend)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
		var said bytes.Buffer
		cmd := exec.Command(path, "-db", "-f", config)
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		r := &contender{name: name, addr: addr, pid: cmd.Process.Pid}
		r.memory = func(b testing.TB) memory {
			return memory{resident: settled(func() float64 { return residentMemory(b, r.pid) })}
		}
		r.stop = func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
		b.Cleanup(r.stop)
		if !eventually(10*time.Second, func() bool { return reachable(addr) }) {
			r.stop()
			b.Fatalf("HAProxy does not come up: %s", &said)
		}
		return r
	}
}

// What a client orders of the backend, behind its ClientHello: one byte, and a size.
const (
	orderEcho = 'e' // all that follows
	orderUp   = 'u' // answer with one byte when so many have come
	orderDown = 'd' // send so many

	sizeDigits = 12
)

// chunk is how much is written and read at once.
const chunk = 256 << 10

// relayedHello is the ClientHello that all clients send; nobody answers it.
var relayedHello = func() []byte {
	var hello bytes.Buffer
	conn := tls.Client(helloOnly{Writer: &hello}, &tls.Config{ServerName: relayedName})
	_ = conn.Handshake() // fails for want of an answer
	return hello.Bytes()
}()

// helloOnly is a connection of which nothing comes.
type helloOnly struct {
	net.Conn
	io.Writer
}

func (c helloOnly) Write(p []byte) (int, error) { return c.Writer.Write(p) }
func (helloOnly) Read([]byte) (int, error)      { return 0, io.EOF }
func (helloOnly) Close() error                  { return nil }

// dialRelay connects a client and sends the ClientHello and an order. Any goroutine may
// call it.
func dialRelay(b testing.TB, r *contender, order byte, size int) *net.TCPConn {
	conn, err := net.DialTimeout("tcp", r.addr, 10*time.Second)
	if err != nil {
		b.Errorf("%s: %v", r.name, err)
		return new(net.TCPConn) // of which every method fails
	}
	_ = conn.SetDeadline(time.Now().Add(5 * time.Minute))
	if _, err := conn.Write(fmt.Appendf(bytes.Clone(relayedHello), "%c%0*d", order, sizeDigits, size)); err != nil {
		b.Errorf("%s: %v", r.name, err)
	}
	return conn.(*net.TCPConn)
}

// serveRelayed is the backend: it follows its client's order.
func serveRelayed(conn net.Conn) {
	_ = conn.SetDeadline(time.Time{})
	first := make([]byte, len(relayedHello)+1+sizeDigits)
	if _, err := io.ReadFull(conn, first); err != nil {
		return
	}
	order := first[len(relayedHello):]
	size, _ := strconv.Atoi(string(order[1:]))
	switch order[0] {
	case orderEcho:
		buf := make([]byte, 4<<10) // there may be thousands of these
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			if _, err := conn.Write(buf[:n]); err != nil {
				return
			}
		}
	case orderUp:
		buf := make([]byte, chunk)
		for left := size; left > 0; {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			left -= n
		}
		_, _ = conn.Write(buf[:1])
	case orderDown:
		buf := make([]byte, chunk)
		for range size / chunk {
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	}
}

// roundTrip sends buf and reads as much back.
func roundTrip(conn io.ReadWriter, buf []byte) bool {
	if _, err := conn.Write(buf); err != nil {
		return false
	}
	_, err := io.ReadFull(conn, buf)
	return err == nil
}

// drain reads to the end and returns how many bytes came, or -1 if there was none.
func drain(conn io.Reader, buf []byte) (got int) {
	for {
		n, err := conn.Read(buf)
		got += n
		switch err {
		case nil:
		case io.EOF:
			return got
		default:
			return -1
		}
	}
}

// comparison is what was measured in turns.
type comparison struct {
	figures []string
	values  [][][]float64 // of a figure, of a kind of relay, in all turns
}

func newComparison(figures ...string) *comparison {
	c := &comparison{figures: figures, values: make([][][]float64, len(figures))}
	for i := range c.values {
		c.values[i] = make([][]float64, len(contenders))
	}
	return c
}

// run takes turns and reports them.
func (c *comparison) run(b *testing.B, measure func(kind int) []float64) {
	before := len(c.values[0][0])
	for b.Loop() {
		for _, kind := range rand.Perm(len(contenders)) {
			for i, value := range measure(kind) {
				c.values[i][kind] = append(c.values[i][kind], value)
			}
			if b.Failed() {
				b.FailNow()
			}
		}
	}
	b.ReportMetric(0, "ns/op") // of all relays together: says nothing
	for i, figure := range c.figures {
		line := fmt.Sprintf("%s, medians of %d:", figure, len(c.values[i][0]))
		for kind, k := range contenders {
			all := c.values[i][kind]
			b.ReportMetric(median(all[before:]), k.name+":"+figure)
			line += fmt.Sprintf(" %s %.4g", k.name, median(all))
			if kind > 0 {
				ratios := ratio(c.values[i][0], all)
				b.ReportMetric(median(ratios[before:]), figure+"÷"+k.name)
				line += fmt.Sprintf(" (÷ %.2f, %.2f to %.2f)", median(ratios), slices.Min(ratios), slices.Max(ratios))
			}
		}
		b.Log(line)
	}
}

func ratio(a, b []float64) []float64 {
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = a[i] / b[i]
	}
	return ratios
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
