// Command backend is a WebSocket backend for the end-to-end tests: a process of its
// own that can be killed, stopped and started again on the same address, and that
// writes down what it read.
//
//	backend -listen 127.0.0.1:21000 -stack gorilla -name a -record a.jsonl
//
// When it listens it prints the address. It ends with code 1 at the end of standard
// input, so that it never outlives who started it, and with code 0 after SIGTERM, once
// all peers have closed; see stop. A line "refuse <status>" on standard input has it
// refuse handshakes from then on, "refuse 0" accept them again; it prints the line
// back when it has taken effect.
//
// The query of a request selects what its connection does besides: echo=1 sends every
// message back, stream=<bytes per second> sends numbered messages; see stream.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// closeTimeout is how long peers have for their close frame after SIGTERM.
const closeTimeout = 5 * time.Second

// settings are what the command line says.
type settings struct {
	listen, stack, name, record string
	termCode                    int
	poison                      string
	answerPings                 string
	pongDelay                   time.Duration
	compress                    bool
	windowBits                  int
	refuse                      int
	subprotocol                 string
}

func main() {
	log.SetFlags(log.Lmicroseconds)
	var s settings
	flag.StringVar(&s.listen, "listen", "127.0.0.1:0", "address to listen on")
	flag.StringVar(&s.stack, "stack", "coder", "WebSocket library: coder or gorilla")
	flag.StringVar(&s.name, "name", "backend", "name, for close reasons and streamed messages")
	flag.StringVar(&s.record, "record", os.DevNull, "file to append the record to")
	flag.IntVar(&s.termCode, "term-code", 1012, "close code to send on SIGTERM")
	flag.StringVar(&s.poison, "poison", "", "exit at once when a message with this text has been read; empty: never")
	flag.StringVar(&s.answerPings, "answer-pings", "all", "all, none, or latest (gorilla): after -pong-delay, only the newest ping")
	flag.DurationVar(&s.pongDelay, "pong-delay", 500*time.Millisecond, "see -answer-pings latest")
	flag.BoolVar(&s.compress, "compress", false, "agree to permessage-deflate")
	flag.IntVar(&s.windowBits, "window-bits", 0, "with -compress (coder): answer with server_max_window_bits, asked or not; 0: do not")
	flag.IntVar(&s.refuse, "refuse", 0, "refuse handshakes with this status; 0: do not")
	flag.StringVar(&s.subprotocol, "subprotocol", "", "answer with this subprotocol, offered or not; empty: the first that is offered")
	flag.Parse()
	if err := run(s, os.Stdin, os.Stdout); err != nil {
		log.Fatalf("backend %s: %v", s.name, err)
	}
}

// check says what is wrong with the settings.
func (s *settings) check() error {
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("surplus arguments %q", flag.Args())
	case s.stack != "coder" && s.stack != "gorilla":
		return fmt.Errorf("unknown stack %q", s.stack)
	case s.answerPings != "all" && s.answerPings != "none" && s.answerPings != "latest":
		return fmt.Errorf("unknown way %q to answer pings", s.answerPings)
	case s.answerPings == "latest" && s.stack != "gorilla":
		return errors.New("only gorilla can answer the latest ping")
	case s.windowBits != 0 && (s.stack != "coder" || !s.compress || s.windowBits < 8 || s.windowBits > 15):
		return errors.New("window bits are 8 to 15, and need -stack coder -compress")
	default:
		return nil
	}
}

// run serves until SIGTERM or the end of stdin, at which the process ends.
func run(s settings, stdin io.Reader, stdout io.Writer) error {
	if err := s.check(); err != nil {
		return err
	}
	rec, err := openRecord(s.record)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", s.listen)
	if err != nil {
		return err
	}
	b := newBackend(s, rec)
	server := &http.Server{Handler: b, ReadHeaderTimeout: 10 * time.Second}
	signals := make(chan os.Signal, 1) // signal.Notify does not wait for a reader
	signal.Notify(signals, syscall.SIGTERM)
	served := make(chan error, 1) // gets what ended Serve, nobody may wait for it
	go serve(server, ln, served)
	go b.obey(stdin, stdout)
	fmt.Fprintln(stdout, ln.Addr())

	select {
	case err := <-served:
		return err
	case <-signals:
		b.stop(ln)
		return nil
	}
}

// serve owns the listener. Closing it ends it.
func serve(server *http.Server, ln net.Listener, served chan<- error) {
	served <- server.Serve(ln)
}

// obey owns standard input: it does what each line says, prints it back, and ends
// the process when there are no more.
func (b *backend) obey(stdin io.Reader, stdout io.Writer) {
	lines := bufio.NewScanner(stdin)
	for lines.Scan() {
		status, ok := strings.CutPrefix(lines.Text(), "refuse ")
		n, err := strconv.Atoi(status)
		if !ok || err != nil {
			log.Fatalf("unknown command %q", lines.Text())
		}
		b.refuse.Store(int64(n))
		fmt.Fprintln(stdout, lines.Text())
	}
	os.Exit(1)
}
