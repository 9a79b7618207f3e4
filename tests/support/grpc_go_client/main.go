// Calls of grpc-go, with messages as bytes: grpc_go_client HOST:PORT, requests on stdin as JSON; see grpc_js_client.js.
package main

import (
	"context"
	"encoding/json"
	"io"
	"log"
	"math"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"
)

type request struct {
	Path       string
	Kind       string
	Messages   [][]byte
	DeadlineMs int `json:"deadline_ms"`
	CancelMs   int `json:"cancel_ms"`
	Compress   bool
	Times      int
}

type answer struct {
	Status  uint32   `json:"status"`
	Details string   `json:"details"`
	Replies [][]byte `json:"replies"`
}

// bytesCodec leaves messages as they are.
type bytesCodec struct{}

func (bytesCodec) Marshal(message interface{}) ([]byte, error) { return *message.(*[]byte), nil }
func (bytesCodec) Name() string                                { return "proto" }
func (bytesCodec) Unmarshal(data []byte, message interface{}) error {
	*message.(*[]byte) = append([]byte(nil), data...)
	return nil
}

func call(connection *grpc.ClientConn, asked request) answer {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if asked.DeadlineMs > 0 {
		ctx, cancel = context.WithTimeout(ctx, time.Duration(asked.DeadlineMs)*time.Millisecond)
		defer cancel()
	}
	if asked.CancelMs > 0 {
		time.AfterFunc(time.Duration(asked.CancelMs)*time.Millisecond, cancel)
	}
	options := []grpc.CallOption{grpc.ForceCodec(bytesCodec{}), grpc.MaxCallRecvMsgSize(math.MaxInt32)}
	if asked.Compress {
		options = append(options, grpc.UseCompressor(gzip.Name))
	}
	replies := [][]byte{}
	var failed error
	if asked.Kind == "unary" {
		var reply []byte
		if failed = connection.Invoke(ctx, asked.Path, &asked.Messages[0], &reply, options...); failed == nil {
			replies = append(replies, reply)
		}
	} else {
		replies, failed = converse(ctx, connection, asked, options)
	}
	ended := status.Convert(failed)
	return answer{uint32(ended.Code()), ended.Message(), replies}
}

func converse(
	ctx context.Context, connection *grpc.ClientConn, asked request, options []grpc.CallOption,
) ([][]byte, error) {
	replies := [][]byte{}
	both := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	stream, err := connection.NewStream(ctx, both, asked.Path, options...)
	if err != nil {
		return replies, err
	}
	for i := range asked.Messages {
		if err := stream.SendMsg(&asked.Messages[i]); err != nil {
			return replies, err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return replies, err
	}
	for {
		var reply []byte
		if err := stream.RecvMsg(&reply); err == io.EOF {
			return replies, nil
		} else if err != nil {
			return replies, err
		}
		replies = append(replies, reply)
	}
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		log.Fatal(err)
	}
	connection, err := grpc.Dial(os.Args[1], grpc.WithInsecure(), grpc.WithBlock())
	if err != nil {
		log.Fatal(err)
	}
	answers := []answer{}
	for _, asked := range requests {
		if asked.Times == 0 {
			asked.Times = 1
		}
		some := make([]answer, asked.Times)
		var all sync.WaitGroup
		for i := range some {
			all.Add(1)
			go func(i int) {
				defer all.Done()
				some[i] = call(connection, asked)
			}(i)
		}
		all.Wait()
		answers = append(answers, some...)
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}
