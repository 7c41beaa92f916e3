// This file tests that a ClientHello finds its backend unchanged, however large it is and
// however it comes; and what becomes of one that is too large, or never complete.

package e2e

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// mostHello is the size of the largest ClientHello, with its own header, that matches
// however it comes: caddy-l4 then reads no more than it does at most for that.
const mostHello = 16<<10 - recordHeader

// recordHeader is the size of the header of a TLS record.
const recordHeader = 5

func TestHellos(t *testing.T) {
	a := testca.New(t)
	type side struct {
		addr string
		taps chan *tap
	}
	sides := make(map[string]side)
	var routes strings.Builder
	for _, name := range []string{"one.test", "two.test"} {
		addr, taps := tappedBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, name, name)}})
		sides[name] = side{addr, taps}
		routes.WriteString(toSNI(name, addr))
	}
	p, addr := startLayer4(t, "", "matching_timeout 1m\n"+routes.String())
	for _, tt := range []struct {
		name  string
		conf  *tls.Config // default: an empty one
		size  int         // of the ClientHello; 0: as it is
		cut   func(t testing.TB, conn net.Conn, hello []byte)
		curve tls.CurveID // default: of the hybrid that clients prefer
	}{
		{name: "post-quantum"},
		{name: "another post-quantum", conf: &tls.Config{CurvePreferences: []tls.CurveID{tls.SecP384r1MLKEM1024}}, curve: tls.SecP384r1MLKEM1024},
		{name: "X25519", conf: &tls.Config{CurvePreferences: []tls.CurveID{tls.X25519}}, curve: tls.X25519},
		{name: "TLS 1.2", conf: &tls.Config{MaxVersion: tls.VersionTLS12}, curve: tls.X25519},
		{name: "resumed", conf: &tls.Config{ClientSessionCache: tls.NewLRUClientSessionCache(2)}},
		{name: "2 KiB", size: 2 << 10},
		{name: "8 KiB", size: 8 << 10},
		{name: "14 KiB", size: 14 << 10},
		{name: "as much as there may be", size: mostHello},
		{name: "14 KiB, 7 bytes at a time", size: 14 << 10, cut: pieces(7)},
		{name: "as much as there may be, in odd pieces", size: mostHello, cut: pieces(1021)},
		{name: "a byte at a time", cut: pieces(1)},
		{name: "in the record's header", cut: parts(func([]byte) []int { return []int{1, 3} })},
		{name: "between header and hello", cut: parts(func([]byte) []int { return []int{5, 6} })},
		{name: "in the hello's header", cut: parts(func([]byte) []int { return []int{7} })},
		{name: "in the name", cut: parts(func(hello []byte) []int { return []int{bytes.Index(hello, []byte(".test"))} })},
		{name: "before the last byte", cut: parts(func(hello []byte) []int { return []int{len(hello) - 1} })},
		{name: "records of a byte", cut: records(1)},
		{name: "records of 3 bytes", cut: records(3)},
		{name: "records of 100 bytes", cut: records(100)},
		{name: "14 KiB in records of 1000 bytes", size: 14 << 10, cut: records(1000)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for name, to := range sides {
				for again := range times(tt.conf) {
					conf := cmp.Or(tt.conf, new(tls.Config)).Clone()
					conf.ServerName, conf.RootCAs = name, a.Pool()
					if tt.size > 0 {
						pad(conf, tt.size)
					}
					mine := &tap{Conn: dialTCP(t, addr)}
					said := 0
					c := tls.Client(&cutter{mine, func(conn net.Conn, hello []byte) {
						said = len(hello) - recordHeader
						if tt.cut == nil {
							_, _ = conn.Write(hello)
						} else {
							tt.cut(t, conn, hello)
						}
					}}, conf)
					wantEcho(t, c, "hello, "+name)
					if got := p.connections(t); len(got) != 1 || got[0].Upstream != to.addr {
						t.Errorf("%s: got %+v, want one connection to %s", name, got, to.addr)
					}
					_ = c.CloseWrite()
					wantEnd(t, c)
					_ = c.Close()
					theirs := <-to.taps
					if !bytes.Equal(theirs.in.Bytes(), mine.out.Bytes()) || !bytes.Equal(theirs.out.Bytes(), mine.in.Bytes()) {
						t.Errorf("%s: client and backend did not get each other's bytes", name)
					}
					if tt.size > 0 && said != tt.size {
						t.Errorf("%s: the ClientHello has %d bytes, want %d", name, said, tt.size)
					}
					want := cmp.Or(tt.curve, tls.X25519MLKEM768)
					state := c.ConnectionState()
					if theirs.state.CurveID != want || state.CurveID != want {
						t.Errorf("%s: key exchange: got %v, at the backend %v; want %v", name, state.CurveID, theirs.state.CurveID, want)
					}
					if resumes := again == 1 && conf.ClientSessionCache != nil; state.DidResume != resumes {
						t.Errorf("%s: resumed: got %t, want %t", name, state.DidResume, resumes)
					}
					p.waitEmpty(t)
				}
			}
		})
	}
}

// times is how often a client connects until it has shown what its config is about.
func times(conf *tls.Config) int {
	if conf != nil && conf.ClientSessionCache != nil {
		return 2
	}
	return 1
}

// A ClientHello that caddy-l4 cannot take is refused: its client is closed and the reason
// logged, no backend learns of it, and nothing is left. So is one that does not come in
// time. (Covers C39. The binary has a log and descriptors of its own.)
func TestHelloRefused(t *testing.T) {
	a := testca.New(t)
	backend, taps := tappedBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "one.test", "one.test")}})
	patient, hasty := freeAddr(t), freeAddr(t)
	routes := toSNI("one.test", backend) + toSNI("two.test", backend)
	p := startBinary(t, "layer4 {\n"+patient+" {\nmatching_timeout 1m\n"+routes+"}\n"+hasty+" {\nmatching_timeout 1s\n"+routes+"}\n}", "respond ok")
	sized := func(size int) []byte {
		conf := &tls.Config{ServerName: "one.test"}
		pad(conf, size)
		return firstFlight(conf)
	}
	// Up to here it depends on how it comes: caddy-l4 reads a piece more than it may.
	slightly := sized(4 + 16<<10 + 1)
	before := p.sockets(t)
	for _, tt := range []struct {
		name, addr string
		send       func(conn net.Conn)
	}{
		{"slightly too large", patient, func(conn net.Conn) { _, _ = conn.Write(slightly) }},
		{"slightly, in pieces", patient, func(conn net.Conn) { pieces(100)(t, conn, slightly) }},
		{"slightly, in records", patient, func(conn net.Conn) { records(1000)(t, conn, slightly) }},
		{"60 KiB", patient, func(conn net.Conn) { _, _ = conn.Write(sized(60 << 10)) }},
		{"half of it", patient, func(conn net.Conn) { _, _ = conn.Write(slightly[:9000]); _ = conn.(*net.TCPConn).CloseWrite() }},
		{"half of it, then silence", hasty, func(conn net.Conn) { _, _ = conn.Write(slightly[:9000]) }},
		{"a record's header, then silence", hasty, func(conn net.Conn) { _, _ = conn.Write(slightly[:recordHeader]) }},
		{"silence", hasty, func(net.Conn) {}},
	} {
		conn := dialTCP(t, tt.addr)
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		tt.send(conn)
		if n, err := conn.Read(make([]byte, 1)); n > 0 || err == nil || os.IsTimeout(err) {
			t.Fatalf("%s: got %d bytes, %v; want the connection closed", tt.name, n, err)
		}
		conn.Close()
	}
	if s := p.stats(t); s.Total > 0 || len(s.ClosedByReason) > 0 {
		t.Errorf("connections: got %+v, want that there was none", s)
	}
	if len(taps) > 0 {
		t.Error("a backend was connected to")
	}
	var after int
	if !eventually(15*time.Second, func() bool { after = p.sockets(t); return after <= before }) {
		t.Errorf("sockets: got %d, want the %d of before", after, before)
	}
	c := dialSNI(t, patient, "one.test", a)
	wantEcho(t, c, "still there")
	c.Close()
	_ = p.cmd.Process.Kill()
	<-p.exited
	log := p.log.String()
	if n := strings.Count(log, "ClientHello too large") + strings.Count(log, "matching buffer is full"); n != 4 {
		t.Errorf("log: got %d that are too large, want 4: %s", n, log)
	}
}

// tap is a connection that keeps what passes.
type tap struct {
	net.Conn
	in, out bytes.Buffer
	state   tls.ConnectionState
}

func (c *tap) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.in.Write(b[:n])
	return n, err
}

func (c *tap) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.out.Write(b[:n])
	return n, err
}

// tappedBackend echoes behind TLS, and tells of each connection that has ended.
func tappedBackend(t testing.TB, conf *tls.Config) (addr string, taps chan *tap) {
	t.Helper()
	taps = make(chan *tap, 10)
	return tcpBackend(t, func(conn net.Conn) {
		c := &tap{Conn: conn}
		server := tls.Server(c, conf)
		echo(server)
		c.state = server.ConnectionState()
		_ = server.CloseWrite()
		taps <- c
	}), taps
}

// cutter is a connection on which what is written first, the ClientHello, is written in
// another way.
type cutter struct {
	net.Conn
	first func(conn net.Conn, hello []byte)
}

func (c *cutter) Write(b []byte) (int, error) {
	first := c.first
	if first == nil {
		return c.Conn.Write(b)
	}
	c.first = nil
	first(c.Conn, b)
	return len(b), nil
}

// pieces writes pieces of a size, each a segment: Go's sockets have TCP_NODELAY.
func pieces(size int) func(t testing.TB, conn net.Conn, hello []byte) {
	return func(_ testing.TB, conn net.Conn, hello []byte) {
		for len(hello) > 0 {
			n, err := conn.Write(hello[:min(size, len(hello))])
			if err != nil { // who reads will see
				return
			}
			hello = hello[n:]
		}
	}
}

// parts cuts at places, and goes on when the proxy has read what came before.
func parts(places func(hello []byte) []int) func(t testing.TB, conn net.Conn, hello []byte) {
	return func(t testing.TB, conn net.Conn, hello []byte) {
		t.Helper()
		from := 0
		for _, to := range append(places(hello), len(hello)) {
			_, _ = conn.Write(hello[from:to])
			if from = to; !eventually(10*time.Second, func() bool { return unread(t, conn) == 0 }) {
				t.Errorf("the proxy does not read the first %d bytes", to)
			}
		}
	}
}

// records cuts the handshake message into records of a size.
func records(size int) func(t testing.TB, conn net.Conn, hello []byte) {
	return func(_ testing.TB, conn net.Conn, hello []byte) {
		head, rest := hello[:3], hello
		var message, all []byte
		for len(rest) > 0 {
			n := 5 + int(rest[3])<<8 + int(rest[4])
			message, rest = append(message, rest[5:n]...), rest[n:]
		}
		for len(message) > 0 {
			n := min(size, len(message))
			all = append(append(all, head...), byte(n>>8), byte(n))
			all, message = append(all, message[:n]...), message[n:]
		}
		_, _ = conn.Write(all)
	}
}

// unread is how much of what conn has sent Caddy, in this process, has not read; negative
// before Caddy has accepted the connection. (The kernel's table of sockets would say it too,
// but takes long to read when there are many.)
func unread(t testing.TB, conn net.Conn) int {
	t.Helper()
	port := func(sa unix.Sockaddr, err error) int {
		if a, ok := sa.(*unix.SockaddrInet4); ok && err == nil {
			return a.Port
		}
		return 0
	}
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		fd, _ := strconv.Atoi(e.Name())
		if port(unix.Getpeername(fd)) == conn.LocalAddr().(*net.TCPAddr).Port && port(unix.Getsockname(fd)) == conn.RemoteAddr().(*net.TCPAddr).Port {
			n, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	return -1
}

// pad has a client offer so many protocols that its ClientHello has a size.
func pad(conf *tls.Config, size int) {
	conf.NextProtos = []string{"p"}
	for more := size + recordHeader - len(firstFlight(conf)); more > 0; {
		n := min(more, 250)
		if more-n == 1 { // a protocol takes two bytes at least
			n--
		}
		conf.NextProtos = append(conf.NextProtos, strings.Repeat("p", n-1))
		more -= n
	}
}

// firstFlight is what a client says before it waits for an answer.
func firstFlight(conf *tls.Config) []byte {
	c := new(unanswered)
	_ = tls.Client(c, conf).Handshake()
	return c.said
}

// unanswered is a connection on which nothing ever comes.
type unanswered struct {
	net.Conn
	said []byte
}

func (c *unanswered) Read([]byte) (int, error) { return 0, io.EOF }

func (c *unanswered) Write(b []byte) (int, error) {
	c.said = append(c.said, b...)
	return len(b), nil
}

func (c *unanswered) Close() error { return nil }
